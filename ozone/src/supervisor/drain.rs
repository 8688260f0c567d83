//! The drain barrier: nothing starts before what a dead process asked of the kernel has ended.
//!
//! A process's end is no such barrier: requests of a ring or a blocked call outlive it. So its sentinel's end is waited for,
//! which every ring of it held, and then for the image's flock on a fresh open file description, which every request on the
//! old one holds. A late read could still reach guest memory, a late write the image.

use std::time::{Duration, Instant};

use crate::resources::{HostDevice, Prepared, ResourceError};

/// How often it is looked whether the lock can be had: the kernel does not tell.
pub const LOOK: Duration = Duration::from_millis(2);

/// How often, when it has long been overdue.
const LATE_LOOK: Duration = Duration::from_millis(100);

/// When it has not ended after so long, it is said.
const OVERDUE: Duration = Duration::from_secs(10);

/// How long it takes until the host is asked again for what it did not give.
const RETRY: Duration = Duration::from_secs(1);

/// How far the requests of a dead process are.
#[derive(Debug)]
pub struct Drain {
    /// What the next process is handed, once it is free.
    prepared: Option<Prepared>,
    /// When it is looked at again.
    look: Instant,
    /// When it is overdue, until that has been said.
    overdue: Option<Instant>,
}

/// What a look finds.
#[derive(Debug)]
pub enum Look {
    /// Nothing is under way: the next process can be handed this.
    Free(Prepared),
    /// Something still is; perhaps there is something to say.
    Waits(Option<ResourceError>),
}

impl Drain {
    /// A process has just ended.
    pub fn new(now: Instant) -> Self {
        Self { prepared: None, look: now, overdue: Some(now + OVERDUE) }
    }

    /// When it is to be looked at, if nothing happens before.
    pub fn deadline(&self) -> Instant {
        self.look
    }

    /// Looks at `now` whether all has ended; `ended` says that of the process and its sentinel.
    pub fn look(&mut self, host: &HostDevice, ended: bool, now: Instant) -> Look {
        let mut complaint = None;
        if ended {
            let fresh = self.prepared.take().map_or_else(|| host.prepare(), Ok);
            match fresh.and_then(|fresh| fresh.is_free().map(|free| (fresh, free))) {
                Ok((fresh, true)) => return Look::Free(fresh),
                Ok((fresh, false)) => {
                    self.prepared = Some(fresh);
                    self.look = now + if self.overdue.is_some() { LOOK } else { LATE_LOOK };
                }
                Err(error) => {
                    self.look = now + RETRY;
                    complaint = Some(error);
                }
            }
        } else {
            // The sentinel's end is told.
            self.look = self.overdue.unwrap_or(now + OVERDUE);
        }
        // Once: a complaint of the host is all there is to say as well.
        if let Some(overdue) = self.overdue
            && (overdue <= now || complaint.is_some())
        {
            self.overdue = None;
            self.look = self.look.max(now + LOOK);
            return Look::Waits(complaint.or_else(|| host.draining(OVERDUE.as_secs())));
        }
        Look::Waits(None)
    }
}
