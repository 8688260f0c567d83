//! What is done wrong, as the disk's name says: `WORD[MESSAGE][-START]`.
//!
//! `MESSAGE` counts the requests of the core from 1 and says on which one a play about requests comes: 2, GET_FEATURES, if
//! none is named. `START` is the start of the disk's backend at which it happens, 2 if none is named: the first one after
//! the machine's own. So `never` hangs at the second request of the first restart, and `close12-3` closes the connection
//! after the twelfth of the second.

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Play {
    /// Nothing.
    Honest,
    /// Before or instead of saying that it is ready.
    Launch(Launch),
    /// When this request of the core comes.
    Request(u32, Request),
    /// When the core asks for memory for what is in flight.
    Inflight(Inflight),
    /// When the first request of the driver comes.
    Ring(Ring),
    /// Once it serves.
    Serving(Serving),
    /// In what it says of itself.
    Offer(Offer),
}

/// How the launch goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launch {
    /// It is never ready.
    NeverReady,
    /// It is ready twice.
    ReadyTwice,
    /// It says that it failed, and stays.
    Failed,
    /// It ends in good order.
    ExitWell,
    /// It ends in disorder.
    ExitBadly,
}

/// How a request is dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The answer is late, but within the core's patience.
    Late,
    /// The answer comes when the core has given up.
    TooLate,
    /// The answer is of another request.
    WrongCode,
    /// The answer is not marked as one.
    NoAnswer,
    /// The answer's first half comes, and no more.
    Half,
    /// The answer says that it is shorter than it is.
    Short,
    /// The answer says that it is longer than it is.
    Long,
    /// The answer says that it is 4 GiB long.
    Huge,
    /// Nothing comes.
    Never,
    /// The connection is closed after the answer.
    Close,
    /// The process ends.
    Exit,
}

/// What the core gets as memory for what is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inflight {
    /// No descriptor.
    None,
    /// Two descriptors.
    Two,
    /// The disk's image.
    Image,
    /// The pipe by which `ozone` knows that nothing is under way any more.
    Pipe,
    /// The control channel.
    Socket,
    /// Less than the queues take.
    Small,
    /// No byte.
    Zero,
    /// Four gigabytes, it says, and one page.
    Huge,
    /// One byte less than the queues take.
    Odd,
    /// An offset that is no multiple of a page.
    Offset,
    /// Memory that may shrink.
    Unsealed,
    /// Memory that is cut off after it was handed over: its own filter does not let it.
    Cut,
    /// Memory that says that every descriptor is in flight.
    Full,
}

/// What is done to a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// The used index runs ahead by half of all numbers.
    UsedJump,
    /// The used index goes back.
    UsedBack,
    /// A request is completed twice.
    HeadTwice,
    /// A request is completed that never was one.
    HeadUnknown,
    /// Kick and call are filled up, so that whoever writes them would wait.
    EventsFull,
    /// Kick and call are made to block: its own filter does not let it.
    EventsBlock,
}

/// What else is done while it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serving {
    /// It gives no sign of life.
    NoAlive,
    /// It gives signs of life that nobody asked for.
    WrongAlive,
    /// It sends messages to `ozone` without end.
    FloodControl,
    /// It writes log lines without end.
    FloodLog,
    /// It says that it carried billions of requests out again, over and over.
    Resubmitted,
}

/// What it says less of itself than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// A feature that the driver has accepted.
    Features,
    /// The number of queues.
    Queues,
    /// A smaller disk.
    Capacity,
}

/// The request a play about requests comes on, if none is named.
const MESSAGE: u32 = 2;

/// The start of the backend at which a play comes, if none is named.
const START: u64 = 2;

/// Every word and what it means.
const WORDS: [(&str, Play); 44] = [
    ("never-ready", Play::Launch(Launch::NeverReady)),
    ("ready-twice", Play::Launch(Launch::ReadyTwice)),
    ("failed", Play::Launch(Launch::Failed)),
    ("exit-well", Play::Launch(Launch::ExitWell)),
    ("exit-badly", Play::Launch(Launch::ExitBadly)),
    ("late", Play::Request(MESSAGE, Request::Late)),
    ("too-late", Play::Request(MESSAGE, Request::TooLate)),
    ("wrong-code", Play::Request(MESSAGE, Request::WrongCode)),
    ("no-answer", Play::Request(MESSAGE, Request::NoAnswer)),
    ("half", Play::Request(MESSAGE, Request::Half)),
    ("short", Play::Request(MESSAGE, Request::Short)),
    ("long", Play::Request(MESSAGE, Request::Long)),
    ("huge", Play::Request(MESSAGE, Request::Huge)),
    ("never", Play::Request(MESSAGE, Request::Never)),
    ("close", Play::Request(MESSAGE, Request::Close)),
    ("exit", Play::Request(MESSAGE, Request::Exit)),
    ("inflight-none", Play::Inflight(Inflight::None)),
    ("inflight-two", Play::Inflight(Inflight::Two)),
    ("inflight-image", Play::Inflight(Inflight::Image)),
    ("inflight-pipe", Play::Inflight(Inflight::Pipe)),
    ("inflight-socket", Play::Inflight(Inflight::Socket)),
    ("inflight-small", Play::Inflight(Inflight::Small)),
    ("inflight-zero", Play::Inflight(Inflight::Zero)),
    ("inflight-huge", Play::Inflight(Inflight::Huge)),
    ("inflight-odd", Play::Inflight(Inflight::Odd)),
    ("inflight-offset", Play::Inflight(Inflight::Offset)),
    ("inflight-unsealed", Play::Inflight(Inflight::Unsealed)),
    ("inflight-cut", Play::Inflight(Inflight::Cut)),
    ("inflight-full", Play::Inflight(Inflight::Full)),
    ("used-jump", Play::Ring(Ring::UsedJump)),
    ("used-back", Play::Ring(Ring::UsedBack)),
    ("head-twice", Play::Ring(Ring::HeadTwice)),
    ("head-unknown", Play::Ring(Ring::HeadUnknown)),
    ("events-full", Play::Ring(Ring::EventsFull)),
    ("events-block", Play::Ring(Ring::EventsBlock)),
    ("no-alive", Play::Serving(Serving::NoAlive)),
    ("wrong-alive", Play::Serving(Serving::WrongAlive)),
    ("flood-control", Play::Serving(Serving::FloodControl)),
    ("flood-log", Play::Serving(Serving::FloodLog)),
    ("resubmitted", Play::Serving(Serving::Resubmitted)),
    ("less-features", Play::Offer(Offer::Features)),
    ("less-queues", Play::Offer(Offer::Queues)),
    ("less-capacity", Play::Offer(Offer::Capacity)),
    ("honest", Play::Honest),
];

impl Play {
    /// What the disk of that name plays at that start of its backend, from 1. A name that says nothing is an honest disk's.
    pub fn of(name: &str, start: u64) -> Self {
        let (word, at) = match name.rsplit_once('-') {
            Some((word, number)) if number.parse::<u64>().is_ok() => (word, number.parse().unwrap_or(START)),
            _ => (name, START),
        };
        let bare = word.trim_end_matches(|letter: char| letter.is_ascii_digit());
        let message = word.get(bare.len()..).and_then(|digits| digits.parse().ok());
        let play = WORDS.iter().find(|(known, _)| *known == bare).map(|(_, play)| *play);
        match (play, message) {
            (Some(_), _) if at != start => Self::Honest,
            (Some(Self::Request(_, request)), Some(message)) => Self::Request(message, request),
            (play, _) => play.unwrap_or(Self::Honest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_and_when() {
        assert_eq!(Play::of("never", 1), Play::Honest);
        assert_eq!(Play::of("never", 2), Play::Request(2, Request::Never));
        assert_eq!(Play::of("close12-3", 3), Play::Request(12, Request::Close));
        assert_eq!(Play::of("close12-3", 2), Play::Honest);
        assert_eq!(Play::of("inflight-unsealed-1", 1), Play::Inflight(Inflight::Unsealed));
        assert_eq!(Play::of("disk0", 2), Play::Honest);
        assert!(WORDS.iter().all(|(word, _)| word.len() <= 18), "a name is cut after 20 characters");
    }
}
