//! Rules that keep the control plane safe and moving, by name. A simulation switches one off at a time, to see that it
//! would notice; anywhere else all of them are in force, and asking costs nothing.

/// A rule that can be switched off.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Rule {
    /// A dispatcher manager serves its owner only.
    OwnerFence,
    /// A changefeed that was closed is not brought back by a delayed bootstrap.
    Tombstone,
    /// A maintainer that was stopped is not brought back by a delayed command.
    StoppedEpochs,
    /// A maintainer that leaves starts and advances nothing.
    Quiesce,
    /// What was lost on its way to a dispatcher manager is said again.
    OperatorResend,
    /// A dispatcher that stands at an event says so until it is heard.
    BlockResend,
    /// A writer that did not hear that it may write is told again.
    WriteResend,
    /// A removal of a dispatcher that is not there clears what a creation left.
    JournalClearing,
    /// A span is started at its new place after the old one has let go.
    OriginFirst,
    /// A span that an operator works on holds the checkpoint.
    OperatorsHold,
    /// A span that nobody runs holds the checkpoint.
    AbsentHolds,
    /// A newer membership of a node's watermark counts although it is behind.
    WatermarkGeneration,
    /// An event is written after everybody has arrived.
    EverybodyArrives,
    /// The table trigger holds the checkpoint in front of a table that its owner does not know yet.
    NewTableHolds,
    /// Rows in front of a schema change are durable before it is reported.
    FlushBeforeBlock,
    /// Commands of one sender arrive in order and once.
    CommandOrder,
    /// Dispatchers of tables that a replayed change will create are gone before it creates them.
    StrangersFirst,
    /// What an owner whose node died had elsewhere can be closed by another node.
    CloseElsewhere,
    /// A leader that drains gives its role up until it has succeeded.
    ResignationRepeated,
    /// A drain counts dispatchers that are on their way.
    DrainCountsMoves,
    /// A maintainer begins after every node has said what it runs.
    EveryNodeAnswers,
    /// The target of a drain is cleared within its epoch, once.
    ClearOnce,
    /// The checkpoint is computed over one state: no look at it comes between the end of a node's watermark and the
    /// constraint of its spans.
    OneSnapshot,
    /// Of a node that is gone nothing can be written before somebody else is given its spans.
    FenceFirst,
    /// A process whose lease is not confirmed in time writes nothing.
    PermitEnds,
    /// Nothing of a log is dropped where it is read before the maintainer has taken over.
    FloorWaits,
}

impl Rule {
    /// All of them.
    pub const ALL: [Self; 26] = [
        Self::OwnerFence,
        Self::Tombstone,
        Self::StoppedEpochs,
        Self::Quiesce,
        Self::OperatorResend,
        Self::BlockResend,
        Self::WriteResend,
        Self::JournalClearing,
        Self::OriginFirst,
        Self::OperatorsHold,
        Self::AbsentHolds,
        Self::WatermarkGeneration,
        Self::EverybodyArrives,
        Self::NewTableHolds,
        Self::FlushBeforeBlock,
        Self::CommandOrder,
        Self::StrangersFirst,
        Self::CloseElsewhere,
        Self::ResignationRepeated,
        Self::DrainCountsMoves,
        Self::EveryNodeAnswers,
        Self::ClearOnce,
        Self::OneSnapshot,
        Self::FenceFirst,
        Self::PermitEnds,
        Self::FloorWaits,
    ];

    /// The rule that stops what this one is for nearly every time. Alone, the absence of this one can hardly be noticed;
    /// with the other one away too, it can.
    #[must_use]
    pub const fn behind(self) -> Option<Self> {
        match self {
            Self::Quiesce => Some(Self::OwnerFence),
            Self::StoppedEpochs | Self::Tombstone | Self::JournalClearing => Some(Self::CommandOrder),
            Self::NewTableHolds => Some(Self::AbsentHolds),
            Self::PermitEnds => Some(Self::FenceFirst),
            Self::OwnerFence
            | Self::OperatorResend
            | Self::BlockResend
            | Self::WriteResend
            | Self::OriginFirst
            | Self::OperatorsHold
            | Self::AbsentHolds
            | Self::WatermarkGeneration
            | Self::EverybodyArrives
            | Self::FlushBeforeBlock
            | Self::CommandOrder
            | Self::StrangersFirst
            | Self::CloseElsewhere
            | Self::ResignationRepeated
            | Self::DrainCountsMoves
            | Self::EveryNodeAnswers
            | Self::ClearOnce
            | Self::OneSnapshot
            | Self::FenceFirst
            | Self::FloorWaits => None,
        }
    }

    /// Whether it is in force.
    #[inline]
    #[must_use]
    pub fn holds(self) -> bool {
        #[cfg(feature = "test-util")]
        return !switches::is_off(self);
        #[cfg(not(feature = "test-util"))]
        true
    }
}

/// Switches of the current thread.
#[cfg(feature = "test-util")]
pub(crate) mod switches {
    use std::cell::Cell;

    use super::Rule;

    thread_local! {
        static OFF: Cell<[Option<Rule>; 2]> = const { Cell::new([None; 2]) };
    }

    pub(crate) fn is_off(rule: Rule) -> bool {
        OFF.get().contains(&Some(rule))
    }

    /// Switches rules off in this thread, and those before on again.
    pub fn switch_off(rules: [Option<Rule>; 2]) {
        OFF.set(rules);
    }
}
