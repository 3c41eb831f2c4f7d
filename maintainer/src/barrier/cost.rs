//! Counts what the barrier does with each table and span, so that a test can compare how it grows.

#[cfg(test)]
thread_local! {
    static STEPS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// A table or span was looked at.
pub(super) fn step() {
    #[cfg(test)]
    STEPS.with(|steps| steps.set(steps.get() + 1));
}

/// Steps that this thread took so far.
#[cfg(test)]
pub(super) fn taken() -> u64 {
    STEPS.with(std::cell::Cell::get)
}
