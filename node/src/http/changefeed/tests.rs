//! What is shown of changefeeds in states that only older documents have.

use std::sync::Arc;

use coordinator::Group;
use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{ChangefeedId, Ts};

use super::*;

fn feed(state: ChangefeedState) -> ChangefeedView {
    let id = ChangefeedId::fresh("f");
    let upstream = UpstreamInfo::default();
    let mut info = ChangefeedInfo::new(id, upstream, "blackhole://", ReplicaConfig::default(), Ts(7));
    info.state = state;
    // As it is stored, and read by the next coordinator.
    let (info, _) = ChangefeedInfo::from_json(&info.to_json(), KEYSPACE, "f").unwrap();
    ChangefeedView {
        info: Arc::new(info),
        checkpoint: Ts(9),
        saved_checkpoint: Ts(9),
        saved_time: None,
        last_synced: Ts(9),
        group: Group::Absent,
        node: None,
        bootstrap_done: false,
        errors: Vec::new(),
        removing: false,
        waiting_for: None,
    }
}

#[test]
// behaviour: api-A-9
fn a_changefeed_whose_stored_state_is_empty_is_normal_and_one_that_is_pending_is_warning() {
    let listed = |state| common_info(&feed(state), &Facts::default())["state"].clone();
    assert_eq!(listed(ChangefeedState::Uninitialized), "normal");
    assert_eq!(listed(ChangefeedState::Pending), "warning");
    for state in [
        ChangefeedState::Normal,
        ChangefeedState::Warning,
        ChangefeedState::Failed,
        ChangefeedState::Stopped,
        ChangefeedState::Finished,
        ChangefeedState::Removed,
    ] {
        assert_eq!(listed(state), state.name());
    }
    let item = common_info(&feed(ChangefeedState::Normal), &Facts::default());
    assert!(item["error"].is_null() && item.get("error").is_some(), "it is always there: {item}");
}
