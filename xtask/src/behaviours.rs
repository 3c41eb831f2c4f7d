//! The behaviour catalogue against the tests.
//!
//! `docs/behaviours/*.md` has one line per behaviour, `- **id** given … / when … / then …`; a test names what
//! it shows in a comment `// behaviour: id, id`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Result, bail};

/// Prints the coverage per subsystem; fails when a test names an id that the catalogue does not have.
pub(crate) fn run(root: &Path, list_missing: bool) -> Result<()> {
    let catalogue = read_catalogue(root)?;
    let shown = read_tests(root)?;
    let mut known = BTreeSet::new();
    for (subsystem, behaviours) in &catalogue {
        let covered = behaviours.iter().filter(|(id, _)| shown.contains(*id)).count();
        let dropped = behaviours.values().filter(|dropped| **dropped).count();
        println!(
            "{subsystem:<14} {covered:>4} of {:>4} shown by a test, {dropped} dropped",
            behaviours.len()
        );
        if list_missing {
            for (id, dropped) in behaviours {
                if !*dropped && !shown.contains(id) {
                    println!("  {id}");
                }
            }
        }
        known.extend(behaviours.keys().cloned());
    }
    let unknown: Vec<&String> = shown.difference(&known).collect();
    if !unknown.is_empty() {
        bail!("tests name behaviours that docs/behaviours does not list: {unknown:?}");
    }
    Ok(())
}

/// Subsystem → id → whether it was dropped.
fn read_catalogue(root: &Path) -> Result<BTreeMap<String, BTreeMap<String, bool>>> {
    let mut catalogue = BTreeMap::new();
    for entry in std::fs::read_dir(root.join("docs/behaviours"))? {
        let path = entry?.path();
        let Some(subsystem) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        if path.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let text = std::fs::read_to_string(&path)?;
        let mut behaviours = BTreeMap::new();
        for line in text.lines().filter_map(|line| line.trim_start().strip_prefix("- **")) {
            if let Some((id, rest)) = line.split_once("**") {
                let twice = behaviours.insert(id.to_owned(), rest.contains("dropped")).is_some();
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
