//! The built-in status page: one document without anything from elsewhere, which asks the API every two seconds.

use axum::http::header;
use axum::response::IntoResponse;

/// The document, as part of the program.
const PAGE: &str = include_str!("page.html");

/// Scripts and styles of the document itself only, and no other place to send anything to.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) async fn page() -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_writes_no_markup_from_data() {
        for word in
            ["http://", "https://", "src=", "@import", "innerHTML", "outerHTML", "document.write", "eval("]
        {
            assert!(!PAGE.contains(word), "{word}");
        }
        assert!(PAGE.len() < 16 << 10, "{} bytes", PAGE.len());
    }
}
