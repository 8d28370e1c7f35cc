//! What the router could not do while it runs: shown until it is done, and tried again by a timer. What is in force goes on meanwhile.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tracing::{error, info};

/// The pause before the first new try, doubled after each that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What is not done, if anything.
#[derive(Debug, Default)]
pub struct Trouble {
    standing: Option<Standing>,
    /// Failures since the start.
    failures: u64,
}

#[derive(Debug)]
struct Standing {
    /// The last error.
    error: String,
    since: Instant,
    /// When all is tried again.
    due: Instant,
    pause: Duration,
}

impl Trouble {
    /// Notes that something failed.
    pub fn note(&mut self, error: &dyn std::error::Error, now: Instant) {
        self.failures += 1;
        let error = error.to_string();
        let is_new = self.standing.as_ref().is_none_or(|standing| standing.error != error);
        if is_new {
            error!(error, "what is in force stays so, and this is tried again");
        }
        match &mut self.standing {
            Some(standing) => standing.error = error,
            None => {
                self.standing = Some(Standing { error, since: now, due: now + FIRST_PAUSE, pause: FIRST_PAUSE });
            }
        }
    }

    /// When to try again, if there is anything to.
    pub fn due(&self) -> Option<Instant> {
        self.standing.as_ref().map(|standing| standing.due)
    }

    /// Begins a new try of all that may be undone, to be ended by [`Trouble::end_try`].
    pub fn begin_try(&mut self, now: Instant) -> Try {
        if let Some(standing) = &mut self.standing {
            standing.pause = (standing.pause * 2).min(LONGEST_PAUSE);
            standing.due = now + standing.pause;
        }
        Try { failures: self.failures }
    }

    /// Ends it: where nothing failed since it began, nothing is undone any more.
    pub fn end_try(&mut self, begun: &Try, now: Instant) {
        if begun.failures == self.failures
            && let Some(Standing { error, since, .. }) = self.standing.take()
        {
            info!(error, lasted_s = now.duration_since(since).as_secs(), "this is over: all is in force");
        }
    }

    /// For `weir status`.
    pub fn to_json(&self, now: Instant) -> Value {
        let standing = self.standing.as_ref().map(|standing| {
            json!({
                "error": standing.error,
                "sinceSeconds": now.duration_since(standing.since).as_secs(),
                "triedAgainInSeconds": standing.due.saturating_duration_since(now).as_secs(),
            })
        });
        json!({"failures": self.failures, "now": standing})
    }
}

/// A try that is under way.
#[derive(Debug)]
pub struct Try {
    failures: u64,
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn it_is_tried_again_ever_more_rarely_until_all_is_done() {
        let mut trouble = Trouble::default();
        let mut now = Instant::now();
        let start = now;
        assert_eq!((trouble.due(), trouble.to_json(now)["now"].clone()), (None, Value::Null));
        trouble.note(&io::Error::other("no memory"), now);
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            let due = trouble.due().unwrap();
            assert_eq!(due - now, Duration::from_secs(pause));
            // What fails in between brings no try forward and puts none off.
            now += Duration::from_millis(10);
            trouble.note(&io::Error::other("no memory"), now);
            assert_eq!(trouble.due(), Some(due));
            now = due;
            let begun = trouble.begin_try(now);
            trouble.note(&io::Error::other("no space"), now);
            trouble.end_try(&begun, now);
        }
        let said = trouble.to_json(now);
        assert_eq!((&said["failures"], &said["now"]["error"]), (&json!(17), &json!("no space")));
        assert_eq!(said["now"]["sinceSeconds"], json!((now - start).as_secs()));
        let begun = trouble.begin_try(now);
        trouble.end_try(&begun, now);
        assert_eq!((trouble.due(), trouble.to_json(now)["failures"].clone()), (None, json!(17)));
        trouble.note(&io::Error::other("no memory"), now);
        assert_eq!(trouble.due(), Some(now + FIRST_PAUSE), "the next one is another");
    }
}
