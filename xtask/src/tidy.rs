//! Rules of the code base that no compiler checks.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::{errors, licenses, metrics, openapi};

/// Which crate may use which other crates of ours. A new edge is a visible decision.
const LAYERS: [(&str, &[&str]); 17] = [
    ("heartbeatpb", &[]),
    ("snapshot", &[]),
    ("event", &["heartbeatpb"]),
    ("replica", &["heartbeatpb"]),
    ("operator", &["heartbeatpb", "replica"]),
    ("scheduler", &["heartbeatpb", "replica"]),
    ("messaging", &["heartbeatpb"]),
    ("logservice", &["heartbeatpb", "event", "messaging"]),
    ("sink", &["heartbeatpb", "event"]),
    ("dispatcher-manager", &["heartbeatpb", "snapshot", "event", "messaging", "logservice", "sink"]),
    ("dispatcher-orchestrator", &["heartbeatpb", "messaging", "dispatcher-manager"]),
    ("maintainer", &["heartbeatpb", "snapshot", "messaging", "replica", "operator", "scheduler"]),
    ("coordinator", &["heartbeatpb", "snapshot", "messaging", "replica", "operator", "scheduler"]),
    ("verify", &["heartbeatpb"]),
    ("node", &["*"]),
    ("testkit", &["*"]),
    ("xtask", &[]),
];

/// Checks every rule and lists every violation.
pub(crate) fn run(root: &Path) -> Result<()> {
    let mut found = layers(&crate::metadata(root, &["--no-deps"])?);
    found.extend(headers(root)?);
    found.extend(lints(root)?);
    found.extend(tests_in_comments(root)?);
    // Of what this machine builds: the rest may not have been downloaded.
    let platform = crate::host(root)?;
    found.extend(licenses::violations(root, &crate::metadata(root, &["--filter-platform", &platform])?)?);
    found.extend(documented_metrics(root)?);
    found.extend(errors::violations(root)?);
    found.extend(openapi::violations(root)?);
    found.extend(links(root)?);
    if found.is_empty() {
        return Ok(());
    }
    for line in &found {
        eprintln!("{line}");
    }
    bail!("{} violations", found.len())
}

fn layers(metadata: &Value) -> Vec<String> {
    let names: BTreeSet<&str> = LAYERS.iter().map(|(name, _)| *name).collect();
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = LAYERS.iter().find(|(layer, _)| *layer == name) else {
            found.push(format!("crate {name} has no layer in xtask/src/tidy.rs"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = dependency["name"].as_str().unwrap_or_default();
            let for_tests = dependency["kind"] == "dev";
            let ok = !names.contains(used) || for_tests || allowed.contains(&used) || allowed.contains(&"*");
            if !ok {
                found.push(format!("crate {name} must not depend on {used}"));
            }
            if used == "testkit" && !for_tests {
                found.push(format!("crate {name} may use testkit in tests only"));
            }
        }
    }
    found
}

fn headers(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in crate::sources(root)? {
        if !std::fs::read_to_string(&file)?.starts_with("//!") {
            found.push(format!("{} does not open with a //! sentence", file.display()));
        }
    }
    Ok(found)
}

fn lints(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (name, _) in LAYERS {
        let manifest = std::fs::read_to_string(root.join(name).join("Cargo.toml"))?;
        if !manifest.contains("[lints]\nworkspace = true") {
            found.push(format!("crate {name} does not inherit the workspace's lints"));
        }
    }
    Ok(found)
}

/// Blocks in comments that cargo would take for tests: those that do not say what else they are. An example is a program,
/// which is compiled with everything else, found by its name, and run by CI.
fn tests_in_comments(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in crate::sources(root)? {
        let text = std::fs::read_to_string(&file)?;
        found.extend(untold_blocks(&text).into_iter().map(|line| {
            format!(
                "{}:{line}: say what the block is (```text, ```sh), or make an example program of it",
                file.display()
            )
        }));
    }
    Ok(found)
}

/// The lines, from 1, on which a block in a comment for the documentation begins that does not say what it is: between
/// fences, or indented behind an empty line (which cannot say it).
fn untold_blocks(text: &str) -> Vec<usize> {
    let mut found = Vec::new();
    let (mut inside, mut blank) = (false, true);
    for (line, number) in text.lines().zip(1..) {
        let line = line.trim_start();
        let Some(comment) = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")) else {
            (inside, blank) = (false, true);
            continue;
        };
        let words = comment.trim();
        let untold = if let Some(what) = words.strip_prefix("```").or_else(|| words.strip_prefix("~~~")) {
            inside = !inside;
            inside && !["text", "sh"].contains(&what)
        } else {
            !inside && blank && !words.is_empty() && comment.starts_with("     ")
        };
        found.extend(untold.then_some(number));
        blank = words.is_empty();
    }
    found
}

/// Files that a page links to and that are not there, and pages that nothing links to.
fn links(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut linked = BTreeSet::from([root.join("README.md")]);
    let pages = crate::pages(root)?;
    for page in &pages {
        let folder = page.parent().unwrap_or(root);
        for piece in std::fs::read_to_string(page)?.split("](").skip(1) {
            let target = piece.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            match folder.join(target).canonicalize() {
                Ok(path) => drop(linked.insert(path)),
                Err(_) => found.push(format!("{}: {target} does not exist", page.display())),
            }
        }
    }
    let catalogue = root.join("docs/behaviours");
    for page in pages.iter().filter(|page| !page.starts_with(&catalogue)) {
        if !linked.contains(&page.canonicalize()?) && page.parent() != Some(root) {
            found.push(format!("{}: no page links to it", page.display()));
        }
    }
    Ok(found)
}

/// Every metric name is a documented constant, and the page about them is up to date.
fn documented_metrics(root: &Path) -> Result<Vec<String>> {
    let page = metrics::page(root)?;
    let mut found = Vec::new();
    for file in crate::sources(root)? {
        if file.file_name().is_none_or(|name| name != "metrics.rs") || file.starts_with(root.join("xtask")) {
            continue;
        }
        for piece in std::fs::read_to_string(&file)?.split('"').skip(1).step_by(2) {
            let is_name = piece.starts_with("ticdc_") || piece.starts_with("millrace_");
            if is_name && !page.contains(&format!("`{piece}`")) {
                found.push(format!("{}: {piece} is no constant of its own", file.display()));
            }
        }
    }
    if page.lines().any(|line| line.ends_with("|  |")) {
        found.push(format!("{}: a metric has no comment", metrics::PAGE));
    }
    if std::fs::read_to_string(root.join(metrics::PAGE)).unwrap_or_default() != page {
        found.push(format!("{} is out of date, run `cargo xtask metrics`", metrics::PAGE));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_would_be_compiled_is_found() {
        let text = "/// Says:\n///\n/// ```text\n/// a\n/// ```\n    /// ```\n    /// f();\n    /// ```\n//! ```no_run\n//! ```\n";
        assert_eq!(untold_blocks(text), [6, 9]);
        assert_eq!(untold_blocks("/// Says:\n///\n///     f();\n///\n/// - a\n///     b\n"), [3]);
        assert_eq!(
            untold_blocks("/// ```text\nfn f() {}\n/// ```\n"),
            [3],
            "a comment ends, and what is open in it"
        );
    }
}
