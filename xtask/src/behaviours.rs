//! The behaviour catalogue against the tests.
//!
//! `docs/behaviours/*.md` has one line per behaviour, `- **id** given … / when … / then …`, or `- **id** dropped: why`;
//! a test names what it shows in a comment `// behaviour: id, id`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Prints per subsystem how many behaviours a test shows, and which none does. With `strict`, anything missing is
/// a failure.
pub(crate) fn run(root: &Path, strict: bool) -> Result<()> {
    let catalogue = read_catalogue(root)?;
    let shown = read_tests(root)?;
    let mut known = BTreeSet::new();
    let mut gaps = 0;
    for (subsystem, behaviours) in &catalogue {
        let covered = behaviours.keys().filter(|id| shown.contains(*id)).count();
        let dropped = behaviours.values().filter(|dropped| **dropped).count();
        let missing: Vec<&str> = behaviours
            .iter()
            .filter(|(id, dropped)| !**dropped && !shown.contains(*id))
            .map(|(id, _)| {
                id.strip_prefix(subsystem).map_or(id.as_str(), |rest| rest.trim_start_matches('-'))
            })
            .collect();
        print!("{subsystem}: {covered} of {} shown by a test", behaviours.len());
        if dropped > 0 {
            print!(", {dropped} dropped");
        }
        let list =
            if missing.is_empty() { String::new() } else { format!("; missing: {}", missing.join(" ")) };
        println!("{list}");
        gaps += missing.len();
        known.extend(behaviours.keys());
    }
    let unknown: Vec<&str> = shown.iter().filter(|id| !known.contains(id)).map(String::as_str).collect();
    if !unknown.is_empty() {
        println!("named by a test but not listed: {}", unknown.join(" "));
    }
    if strict && gaps + unknown.len() > 0 {
        bail!("{gaps} behaviours without a test, {} tests of unlisted behaviours", unknown.len());
    }
    Ok(())
}

/// Subsystem → id → whether it was dropped.
fn read_catalogue(root: &Path) -> Result<BTreeMap<String, BTreeMap<String, bool>>> {
    let mut catalogue = BTreeMap::new();
    let folder = root.join("docs/behaviours");
    for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        let Some(subsystem) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        if path.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let text = std::fs::read_to_string(&path)?;
        let mut behaviours = BTreeMap::new();
        for line in text.lines().filter_map(|line| line.trim_start().strip_prefix("- **")) {
            if let Some((id, rest)) = line.split_once("**") {
                let twice =
                    behaviours.insert(id.to_owned(), rest.trim_start().starts_with("dropped")).is_some();
                if twice {
                    bail!("{}: {id} is listed twice", path.display());
                }
            }
        }
        catalogue.insert(subsystem.to_owned(), behaviours);
    }
    Ok(catalogue)
}

fn read_tests(root: &Path) -> Result<BTreeSet<String>> {
    let mut shown = BTreeSet::new();
    for file in crate::sources(root)? {
        if file.starts_with(root.join("xtask")) {
            continue;
        }
        for line in std::fs::read_to_string(&file)?.lines() {
            if let Some((_, ids)) = line.split_once("// behaviour:") {
                shown.extend(ids.split(',').map(|id| id.trim().to_owned()).filter(|id| !id.is_empty()));
            }
        }
    }
    Ok(shown)
}
