//! An error as one line for people.

/// An error and its causes in one line, outermost first. A cause whose words are in the line already is left out: many
/// libraries repeat their source in their own message.
#[must_use]
pub fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{what}")]
    struct Layer {
        what: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Option<Box<Layer>> {
        let (what, rest) = texts.split_first()?;
        Some(Box::new(Layer { what, source: layers(rest) }))
    }

    #[test]
    fn causes_follow_their_effects_and_nothing_is_said_twice() {
        let chain = |texts: &[&'static str]| error_chain(&*layers(texts).unwrap());
        assert_eq!(chain(&["cannot connect"]), "cannot connect");
        assert_eq!(chain(&["cannot connect", "no route", "down"]), "cannot connect: no route: down");
        assert_eq!(chain(&["cannot connect: refused", "refused", "by it"]), "cannot connect: refused: by it");
    }
}
