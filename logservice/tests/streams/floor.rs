//! What is kept for those who may begin at the maintainer's checkpoint. Time is virtual: it jumps when nothing is left to do.

use std::time::Duration;

use heartbeatpb::Ts;

use crate::PATIENCE;
use crate::rig::*;

/// Lets a manager take what comes, and its collector tell how far it is, for so many seconds.
async fn go_on(seconds: u64, manager: &mut Manager) {
    let until = tokio::time::Instant::now() + Duration::from_secs(seconds);
    while tokio::time::Instant::now() < until {
        manager.take(Duration::from_millis(250)).await;
    }
}

/// A maintainer that has come to a node waits for the answers of others, while dispatchers of before read its log there.
/// Then it learns that their sinks were fenced, or they fail: they are closed, and others begin where it began.
#[tokio::test(start_paused = true)]
async fn dispatchers_that_begin_anew_before_the_take_over_find_what_those_before_them_had_passed() {
    let limits = || LogLimits { memory_bytes: 4 << 20, disk_bytes: 1 << 30 };
    for rig in [Rig::new(limits()), Rig::over_network(limits(), 1)] {
        let mut writer = rig.open_before_the_take_over(Ts(9));
        let mut manager = rig.manager(64 << 20);
        register(&mut writer, 1);
        let before = manager.subscribe(1, Ts(9));
        let mut sent = Sent::default();
        for commit_ts in 10..20 {
            sent.transaction(&mut writer, commit_ts, &[(1, 60)]).await;
            publish(&mut writer, commit_ts);
        }
        sent.transaction_with_ddl(&mut writer, 20, &[(1, 1)]).await;
        publish(&mut writer, 20);
        manager.until_resolved(20, PATIENCE).await;
        manager.checkpoint_all(20);
        go_on(5, &mut manager).await;
        manager.remove(before);
        let after = manager.subscribe(1, Ts(9));
        manager.until_resolved(20, PATIENCE).await;
        assert_eq!(manager.rows_of(after), sent.rows(1));
        assert_eq!(manager.seen(1).last(), Some(&Seen::Ddl(20)));

        manager.checkpoint_all(20);
        go_on(5, &mut manager).await;
        assert!(rig.stats().memory_bytes > 0, "it may begin anew once more");
        rig.floor(Ts(20));
        go_on(5, &mut manager).await;
        assert_eq!(rig.stats().memory_bytes, 0, "nobody will");
    }
}
