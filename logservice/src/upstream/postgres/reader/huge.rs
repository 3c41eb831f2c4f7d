//! Rows that are too large for this process, refused before they are in it.

use std::path::Path;
use std::sync::LazyLock;

use super::super::pgoutput;
use super::Stream;
use crate::Error;

/// A row is in memory once as it comes and once as it is kept, and another one may be on its way to the downstream
/// meanwhile; the rest of the process needs its part too.
const SHARE: u64 = 4;
/// Smaller rows than this are taken whatever the system says about its memory.
const ALWAYS: u64 = 64 << 20;

/// Memory that this process may have: of the machine, of its control groups, or as its own limit says; `None` where
/// nobody tells.
static MEMORY: LazyLock<Option<u64>> = LazyLock::new(|| {
    let machine = read("/proc/meminfo").and_then(|text| machine_bytes(&text));
    let own = read("/proc/self/limits").and_then(|text| address_space(&text));
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let group = limit_files(&groups).iter().filter_map(|path| read(path)?.trim().parse().ok()).min();
    [machine, own, group].into_iter().flatten().min()
});

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The machine's memory, as `/proc/meminfo` tells it.
fn machine_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The process's own limit, as `/proc/self/limits` tells it.
fn address_space(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Files that may hold a limit, from `/proc/self/cgroup`: those of the group and of every one that it is in. Inside a
/// container the outermost is the container's own.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let within = Path::new(path).ancestors().filter_map(Path::to_str);
        files.extend(within.map(|path| format!("{root}{}/{file}", path.trim_end_matches('/'))));
    }
    files
}

/// Bytes of the largest row that is taken.
fn most() -> u64 {
    MEMORY.map_or(u64::MAX, |memory| (memory / SHARE).max(ALWAYS))
}

impl Stream<'_> {
    /// Refuses the message that is coming in if it is a row that this process cannot hold. `None`: it is one of a transaction
    /// that may be rolled back, so nobody can say yet whether it has to.
    #[inline]
    pub(super) fn check_size(&mut self) -> Result<Option<()>, Error> {
        match self.link.conn.coming() {
            Some((total, _)) if total as u64 > most() && self.unfinished.in_block() => {
                Ok(self.only_at_commit("it has a row that this process cannot hold"))
            }
            Some((total, begin)) if total as u64 > most() && self.open == Some(true) => {
                self.refuse(total, begin).map(Some)
            }
            Some(_) | None => Ok(Some(())),
        }
    }

    fn refuse(&self, bytes: usize, begin: &[u8]) -> Result<(), Error> {
        let Some(relation) = pgoutput::relation_of(begin) else { return Ok(()) };
        let Some(shape) = self.tables.known(relation) else { return Ok(()) };
        let (table, memory) = (&shape.info, MEMORY.unwrap_or_default());
        Err(Error::ValueTooLarge {
            what: format!(
                "a row of table {}.{} has {bytes} bytes in the log, and a server that may have {memory} bytes of memory \
                 takes up to {}; give it more memory and resume. The row stays in the log: otherwise make it smaller or leave its \
                 table out, then remove the changefeed and create it again",
                table.schema,
                table.name,
                most()
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_the_machine_and_the_limits_of_all_groups_count() {
        assert_eq!(machine_bytes("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16 << 20));
        assert_eq!(machine_bytes("MemFree: 1 kB\n"), None);
        assert_eq!(
            address_space("Max address space         1048576              unlimited            bytes"),
            Some(1 << 20)
        );
        assert_eq!(
            address_space("Max address space         unlimited            unlimited            bytes"),
            None
        );
        assert_eq!(
            limit_files("0::/a/b\n"),
            ["/sys/fs/cgroup/a/b/memory.max", "/sys/fs/cgroup/a/memory.max", "/sys/fs/cgroup/memory.max"]
        );
        assert_eq!(
            limit_files("3:cpu:/x\n5:hugetlb,memory:/x\nrubbish\n"),
            ["/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert!(most() >= ALWAYS);
    }
}
