//! Attendants and backends by hand, without a machine.
#![allow(clippy::indexing_slicing)]

use std::fs::File;
use std::io::{Read, Write};
use std::sync::mpsc::channel;
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use protocol::DeviceKind;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::conversation::{PATIENCE, STOP_PATIENCE};
use crate::virtio::state::QueueState;

#[path = "../../../tests/fake/mod.rs"]
mod fake;

use fake::request::{
    GET_CONFIG, GET_FEATURES, GET_INFLIGHT_FD, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_VRING_BASE, SET_FEATURES,
    SET_INFLIGHT_FD, SET_MEM_TABLE, SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL,
    SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM,
};
use fake::{Act, DEADLINE, FEATURES, Fake, Honest, PROTOCOL_FEATURES, Request};

const GREETING: [u32; 6] =
    [SET_OWNER, GET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG];
const QUEUE: [u32; 6] =
    [SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL, SET_VRING_KICK, SET_VRING_ENABLE];

/// Where the used ring of the first queue is.
const USED: u64 = 0x3000;

/// A device whose attendant runs.
struct Bench {
    device: Arc<Device>,
    memory: Memory,
    events: Receiver<Event>,
}

fn queue(size: u16) -> QueueState {
    QueueState { size, ready: true, descriptors: 0x1000, available: 0x2000, used: USED }
}

fn activation(queues: &[QueueState]) -> Activation {
    Activation { features: FEATURES, queues: queues.to_vec() }
}

impl Bench {
    fn new() -> Self {
        let (events, received) = channel();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let id = String::from("disk").try_into().unwrap();
        let (device, commands) = Device::new(id, DeviceKind::Blk, interrupt, events.clone());
        let device = Arc::new(device);
        let memory = crate::memory::create(16 << 20).unwrap();
        let tracer = Tracer::new(false, &events);
        let (wire, confine) = (Box::new(|_: usize, _: &_| Ok(())), Box::new(|| Ok(())));
        let attendant = Attendant::new(device.clone(), memory.clone(), wire, confine, events, tracer);
        std::thread::spawn(move || attendant.serve(&commands));
        Self { device, memory, events: received }
    }

    /// The next event other than that of a conversation.
    fn event(&self, awaited: &str) -> Event {
        loop {
            match self.events.recv_timeout(DEADLINE) {
                Ok(Event::Conversation | Event::Gone(_)) => {}
                Ok(event) => return event,
                Err(error) => panic!("{awaited} was awaited: {error}"),
            }
        }
    }

    fn attach(&self, backend: &mut Fake) {
        self.device.command(Command::Attach(backend.take_socket()));
    }

    fn attached(&self, backend: &mut Fake) {
        self.attach(backend);
        let event = self.event("Attached");
        assert!(matches!(event, Event::Attached(_)), "{event:?}");
    }

    fn lost(&self) -> String {
        match self.event("Lost") {
            Event::Lost(_, reason) => reason,
            other => panic!("instead of Lost: {other:?}"),
        }
    }

    /// Waits until everything commanded so far is done, and nothing more was told.
    fn quiet(&self) {
        let deadline = Instant::now() + DEADLINE;
        while self.device.conversation().deadline().is_some() {
            assert!(Instant::now() < deadline, "the attendant has not done its commands within {DEADLINE:?}");
            std::thread::yield_now();
        }
        let events: Vec<_> =
            self.events.try_iter().filter(|event| !matches!(event, Event::Conversation | Event::Gone(_))).collect();
        assert!(events.is_empty(), "{events:?}");
    }

    /// A reset that another thread waits for.
    fn reset(&self) -> Receiver<()> {
        let (stopped, wait) = channel();
        self.device.command(Command::Stop(stopped));
        wait
    }

    fn set_used_index(&self, index: u16) {
        self.memory.write_obj(index.to_le(), GuestAddress(USED + 2)).unwrap();
    }
}

fn codes(requests: &[Request]) -> Vec<u32> {
    requests.iter().map(|request| request.code).collect()
}

fn find(requests: &[Request], code: u32) -> &Request {
    requests.iter().find(|request| request.code == code).unwrap_or_else(|| panic!("no request {code}"))
}

/// The value of the eventfd that came with a request.
fn counter(requests: &[Request], code: u32) -> u64 {
    let mut value = [0; 8];
    let mut file: &File = &find(requests, code).files[0];
    // An eventfd that was not signalled, and is non-blocking as it should be, answers an error.
    file.read_exact(&mut value).unwrap();
    u64::from_le_bytes(value)
}

/// Whether it is an eventfd, which has no type of file.
fn is_event(file: &File) -> bool {
    nix::sys::stat::fstat(file).unwrap().st_mode & nix::libc::S_IFMT == 0
}

fn answered(wait: &Receiver<()>) -> bool {
    wait.recv_timeout(DEADLINE).is_ok()
}

#[test]
fn a_start_after_driver_ok_begins_at_nought_whatever_memory_says() {
    let bench = Bench::new();
    let mut backend = Honest::default().serve();
    bench.attached(&mut backend);
    assert_eq!(codes(&backend.until(GET_CONFIG)), GREETING);
    bench.set_used_index(77);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    let requests = backend.until(SET_VRING_ENABLE);
    assert_eq!(codes(&requests), [&[SET_FEATURES, SET_MEM_TABLE], &QUEUE[..]].concat());
    assert_eq!(find(&requests, SET_FEATURES).number(), FEATURES | PROTOCOL_FEATURES);
    assert_eq!(find(&requests, SET_VRING_NUM).word(4), 128);
    assert_eq!(find(&requests, SET_VRING_BASE).word(4), 0);
    assert_eq!(counter(&requests, SET_VRING_KICK), 1);
    assert_eq!(counter(&requests, SET_VRING_CALL), 1);
    bench.quiet();
    assert!(backend.heard().is_empty());
    assert_eq!(bench.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 0, "as the backend reads it");
}

#[test]
fn a_later_incarnation_goes_on_where_the_used_ring_ends() {
    let bench = Bench::new();
    let mut first = Honest::default().serve();
    bench.attached(&mut first);
    bench.device.start(activation(&[queue(128), queue(64)]));
    bench.quiet();
    first.die();
    bench.device.command(Command::ReadConfig);
    assert!(bench.lost().starts_with("GET_CONFIG: "));
    bench.device.command(Command::ReadConfig);
    bench.quiet();
    assert!(!bench.device.has_failed(), "the driver notices nothing");
    // What the guest does meanwhile.
    bench.device.offer.get().unwrap().queues[0].kick.write(5).unwrap();
    bench.set_used_index(0xfffe);

    bench.device.command(Command::Gone);
    let mut second = Honest::default().serve();
    bench.attached(&mut second);
    let requests = second.heard();
    assert_eq!(codes(&requests), [&GREETING[..], &[SET_FEATURES, SET_MEM_TABLE], &QUEUE, &QUEUE].concat());
    assert_eq!(find(&requests, SET_FEATURES).number(), FEATURES | PROTOCOL_FEATURES);
    assert_eq!(find(&requests, SET_VRING_BASE).word(4), 0xfffe);
    assert_eq!(counter(&requests, SET_VRING_KICK), 1);
    assert_eq!(counter(&requests, SET_VRING_CALL), 1);
    bench.quiet();
}

#[test]
fn an_earlier_conversation_gives_way_to_a_new_one() {
    let bench = Bench::new();
    let mut first = Honest::default().serve();
    bench.attached(&mut first);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    let mut second = Honest::default().serve();
    bench.attached(&mut second);
    second.until(SET_VRING_ENABLE);
    first.closed();
    bench.quiet();
}

#[test]
fn a_backend_that_ends_at_any_message_is_lost_once_and_its_successor_is_attached() {
    // The greeting, then features, memory, and six messages for each of two queues.
    for last in 1..=GREETING.len() + 2 + 2 * QUEUE.len() {
        let bench = Bench::new();
        let mut count = 0;
        let mut failing = Honest::default().start(move |_| {
            count += 1;
            if count == last { Act::Close } else { Act::Answer }
        });
        bench.attach(&mut failing);
        bench.device.start(activation(&[queue(128), queue(128)]));
        match bench.event("Attached or Lost") {
            Event::Lost(..) => assert!(last <= GREETING.len(), "message {last}"),
            Event::Attached(_) => drop(bench.lost()),
            other => panic!("message {last}: {other:?}"),
        }
        failing.closed();
        bench.quiet();
        bench.device.command(Command::Gone);
        let mut honest = Honest::default().serve();
        bench.attached(&mut honest);
        assert_eq!(honest.heard().len(), GREETING.len() + 2 + 2 * QUEUE.len(), "message {last}");
        bench.quiet();
        assert!(!bench.device.has_failed());
    }
}

#[test]
fn a_backend_that_lacks_what_the_driver_relies_on_is_refused_by_name() {
    let bench = Bench::new();
    let offered = FEATURES | PROTOCOL_FEATURES;
    let mut first = Honest { features: offered | 1 << 13, ..Honest::default() }.serve();
    bench.attached(&mut first);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    for (features, name) in [(offered & !(1 << 9), "VIRTIO_BLK_F_FLUSH"), (offered & !(1 << 29), "VIRTIO_F_EVENT_IDX")]
    {
        let mut lacking = Honest { features, ..Honest::default() }.serve();
        bench.attach(&mut lacking);
        let reason = bench.lost();
        assert!(reason.contains(name), "{reason}");
    }
    let mut narrow = Honest { queues: 1, ..Honest::default() }.serve();
    bench.attach(&mut narrow);
    assert_eq!(bench.lost(), "it answered 1 queues and had 2 before");
    // What was offered but not accepted is not missed.
    bench.attached(&mut Honest::default().serve());
}

#[test]
fn a_reset_waits_for_a_lost_backend_until_it_is_gone() {
    let bench = Bench::new();
    let mut backend =
        Honest::default().start(|request| if request.code == GET_VRING_BASE { Act::Close } else { Act::Answer });
    bench.attached(&mut backend);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    let first = bench.reset();
    assert!(bench.lost().starts_with("GET_VRING_BASE: "));
    let second = bench.reset();
    bench.quiet();
    assert!(first.try_recv().is_err() && second.try_recv().is_err(), "it may still write into guest memory");
    bench.device.command(Command::Gone);
    assert!(answered(&first) && answered(&second));
    // Now there is nothing to wait for.
    assert!(answered(&bench.reset()));
    bench.quiet();

    // A driver that is set up anew meanwhile starts with the next incarnation, from the beginning.
    bench.set_used_index(9);
    bench.device.start(activation(&[queue(64), QueueState::default()]));
    bench.quiet();
    let mut next = Honest::default().serve();
    bench.attached(&mut next);
    let requests = next.heard();
    assert_eq!(find(&requests, SET_VRING_NUM).word(4), 64);
    assert_eq!(find(&requests, SET_VRING_BASE).word(4), 0);
}

#[test]
fn a_dead_backend_leaves_nothing_open_and_is_waited_for_until_it_is_gone() {
    let bench = Bench::new();
    let mut backend = Honest::default().serve();
    bench.attached(&mut backend);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    bench.quiet();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    backend.push(&[0; 12], &[writer]);
    backend.die();
    bench.device.command(Command::Dead);
    assert!(fake::ends(&reader), "what the backend sent unasked is still in the core's socket");
    let reset = bench.reset();
    // It is neither lost again nor detached.
    bench.device.command(Command::Dead);
    bench.device.command(Command::Detach);
    bench.quiet();
    assert!(reset.try_recv().is_err(), "what it began may still be under way");
    bench.device.command(Command::Gone);
    assert!(answered(&reset));
    bench.attached(&mut Honest::default().serve());
}

#[test]
fn a_backend_that_dies_in_its_handshake_is_lost_once() {
    let bench = Bench::new();
    let mut failing =
        Honest::default().start(|request| if request.code == GET_CONFIG { Act::Close } else { Act::Answer });
    bench.attach(&mut failing);
    bench.device.command(Command::Dead);
    assert!(bench.lost().starts_with("GET_CONFIG: "));
    bench.device.command(Command::ReadConfig);
    bench.quiet();
    bench.device.command(Command::Gone);
    bench.attached(&mut Honest::default().serve());
}

#[test]
fn a_reset_stops_the_queues_of_a_backend_that_lives() {
    let bench = Bench::new();
    let mut backend = Honest::default().serve();
    bench.attached(&mut backend);
    bench.device.start(activation(&[queue(128), queue(128)]));
    assert!(answered(&bench.reset()));
    let requests = backend.heard();
    assert_eq!(codes(&requests)[requests.len() - 2..], [GET_VRING_BASE, GET_VRING_BASE]);
    // The same process holds the signals: they are given again, but whoever wrote to one now would wait for it.
    let events: Vec<_> = requests.iter().flat_map(|request| &request.files).filter(|file| is_event(file)).collect();
    for mut file in events.iter().copied() {
        // The call is that of both queues: the second write finds it full.
        let _ = file.write(&(u64::MAX - 2).to_ne_bytes());
    }
    for file in events {
        fcntl(file, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    }
    bench.device.start(activation(&[queue(128), queue(128)]));
    bench.quiet();
    assert_eq!(codes(&backend.heard()), [&[SET_FEATURES, SET_MEM_TABLE], &QUEUE[..], &QUEUE].concat());
    bench.pause(Command::Pause);
    bench.pause(Command::Resume);
    // Nothing is started for a driver that has gone.
    assert!(answered(&bench.reset()));
    backend.die();
    let mut next = Honest::default().serve();
    bench.attached(&mut next);
    assert_eq!(codes(&next.heard()), GREETING);
}

#[test]
fn a_silent_backend_is_lost_at_its_deadline_and_then_no_clock_runs() {
    let bench = Bench::new();
    let mut backend =
        Honest::default().start(|request| if request.code == SET_MEM_TABLE { Act::Silence } else { Act::Answer });
    bench.attached(&mut backend);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    backend.until(SET_MEM_TABLE);
    bench.device.conversation().hang_up_if_overdue(Instant::now() + 2 * PATIENCE);
    assert!(bench.lost().starts_with("it did not answer within 8 s: "));
    let reset = bench.reset();
    bench.quiet();
    assert!(reset.try_recv().is_err());
    assert_eq!(bench.device.conversation().deadline(), None, "it waits for ozone now, and not for a backend");
    bench.device.command(Command::Gone);
    assert!(answered(&reset));
}

#[test]
fn rings_outside_of_memory_are_the_drivers_fault_and_not_repeated() {
    let bench = Bench::new();
    let mut backend = Honest::default().serve();
    bench.attached(&mut backend);
    backend.heard();
    bench.device.start(activation(&[QueueState { used: 1 << 40, ..queue(128) }, QueueState::default()]));
    bench.quiet();
    assert!(bench.device.has_failed());
    assert!(backend.heard().is_empty(), "the backend hears nothing of it");
    let mut next = Honest::default().serve();
    bench.attached(&mut next);
    assert_eq!(codes(&next.heard()), GREETING);
}

#[test]
fn what_is_in_flight_goes_from_incarnation_to_incarnation_until_the_reset() {
    let bench = Bench::new();
    let mut first = Honest::tracking().serve();
    bench.attached(&mut first);
    first.until(GET_CONFIG);
    bench.device.start(activation(&[queue(64), queue(128)]));
    bench.quiet();
    let requests = first.heard();
    let start = [&[SET_FEATURES, SET_MEM_TABLE, GET_INFLIGHT_FD, SET_INFLIGHT_FD], &QUEUE[..], &QUEUE].concat();
    assert_eq!(codes(&requests), start);
    let asked = &find(&requests, GET_INFLIGHT_FD).body;
    assert_eq!(asked[16..20], [2, 0, 128, 0], "all queues, as large as the largest");
    let set = find(&requests, SET_INFLIGHT_FD);
    let (region, place) = (set.inode(), set.body.clone());
    assert_eq!(place[..20], [&(16u64 * 1024).to_le_bytes()[..], &[0; 8], &[2, 0, 128, 0]].concat());
    first.die();

    // More than once, and whatever each of them offers in its place.
    for _ in 0..3 {
        bench.device.command(Command::Gone);
        let mut next = Honest::tracking().serve();
        bench.attached(&mut next);
        let requests = next.heard();
        let replay = [&GREETING[..], &[SET_FEATURES, SET_MEM_TABLE, SET_INFLIGHT_FD], &QUEUE, &QUEUE].concat();
        assert_eq!(codes(&requests), replay);
        let set = find(&requests, SET_INFLIGHT_FD);
        assert_eq!((set.inode(), &set.body), (region, &place));
        next.die();
    }
    let mut forgetful = Honest::default().serve();
    bench.attach(&mut forgetful);
    let reason = bench.lost();
    assert!(reason.contains("VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD"), "{reason}");

    bench.device.command(Command::Gone);
    assert!(answered(&bench.reset()));
    bench.device.start(activation(&[queue(64), queue(128)]));
    let mut last = Honest::tracking().serve();
    bench.attached(&mut last);
    let requests = last.heard();
    assert_eq!(codes(&requests)[GREETING.len()..], start);
    assert_ne!(find(&requests, SET_INFLIGHT_FD).inode(), region, "a reset ends what was in flight");
}

#[test]
fn a_region_that_no_successor_could_use_is_refused() {
    type Forge = fn(&Request) -> (Vec<u8>, Vec<OwnedFd>);
    fn body(request: &Request, size: u64, offset: u64) -> Vec<u8> {
        [&size.to_le_bytes()[..], &offset.to_le_bytes(), &request.body[16..]].concat()
    }
    fn memory(size: u64) -> Vec<OwnedFd> {
        fake::inflight(&[0; 24], size).1
    }
    fn sealed(seals: SealFlag) -> Vec<OwnedFd> {
        let memory = memory(8192);
        fcntl(&memory[0], FcntlArg::F_ADD_SEALS(seals)).unwrap();
        memory
    }
    let forgeries: [(&str, Forge); 13] = [
        ("and no further", |request| (body(request, 8192, 0), sealed(SealFlag::F_SEAL_WRITE))),
        ("and no further", |request| (body(request, 8192, 0), sealed(SealFlag::F_SEAL_FUTURE_WRITE))),
        ("GET_INFLIGHT_FD: ", |request| (body(request, 8192, 0), Vec::new())),
        ("GET_INFLIGHT_FD: ", |request| {
            (body(request, 8192, 0), memory(8192).into_iter().chain(memory(8192)).collect())
        }),
        ("GET_INFLIGHT_FD: ", |_| (vec![0; 24], memory(8192))),
        ("3 queues of 128", |request| {
            let mut body = body(request, 8192, 0);
            body[16] = 3;
            (body, memory(8192))
        }),
        ("2 queues of 64", |request| {
            let mut body = body(request, 8192, 0);
            body[18] = 64;
            (body, memory(8192))
        }),
        ("4127 bytes at 0x0", |request| (body(request, 4127, 0), memory(8192))),
        ("8192 bytes at 0x10", |request| (body(request, 8192, 16), memory(1 << 20))),
        ("1048577 bytes", |request| (body(request, (1 << 20) + 1, 0), memory(2 << 20))),
        ("8192 bytes at 0xfffffffffffff000", |request| (body(request, 8192, !0xfff), memory(8192))),
        ("ends before 0x3000", |request| (body(request, 8192, 4096), memory(8192))),
        ("not memory sealed", |request| {
            let (_, writer) = nix::unistd::pipe().unwrap();
            (body(request, 8192, 0), vec![writer])
        }),
    ];
    for (expected, forge) in forgeries {
        let bench = Bench::new();
        let mut forger = Honest::tracking().start(move |request| {
            if request.code == GET_INFLIGHT_FD {
                let (body, files) = forge(request);
                Act::Send(fake::message(request, &body), files)
            } else {
                Act::Answer
            }
        });
        bench.attached(&mut forger);
        bench.device.start(activation(&[queue(128), queue(128)]));
        let reason = bench.lost();
        assert!(reason.contains(expected), "{expected}: {reason}");
        bench.device.command(Command::Gone);
        let mut honest = Honest::tracking().serve();
        bench.attached(&mut honest);
        find(&honest.heard(), GET_INFLIGHT_FD);
    }
}

#[test]
fn a_record_that_a_successor_refuses_breaks_the_device_and_not_the_successor() {
    let bench = Bench::new();
    let mut first = Honest::tracking().serve();
    bench.attached(&mut first);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    bench.quiet();
    let region = find(&first.heard(), SET_INFLIGHT_FD).inode();
    first.die();
    bench.device.command(Command::Gone);
    let mut once = true;
    let mut second = Honest::tracking().start(move |request| {
        if request.code == SET_INFLIGHT_FD && std::mem::take(&mut once) {
            Act::Send(fake::message(request, &1u64.to_le_bytes()), Vec::new())
        } else {
            Act::Answer
        }
    });
    bench.attached(&mut second);
    let requests = second.heard();
    assert_eq!(codes(&requests), [&GREETING[..], &[SET_FEATURES, SET_MEM_TABLE, SET_INFLIGHT_FD]].concat());
    assert!(bench.device.has_failed());
    bench.quiet();
    assert!(bench.device.stop(DEADLINE));
    bench.device.mend();
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    let requests = second.until(SET_VRING_ENABLE);
    assert_ne!(find(&requests, SET_INFLIGHT_FD).inode(), region);
    bench.quiet();
    assert!(!bench.device.has_failed());
}

#[test]
fn a_region_that_is_refused_by_who_made_it_is_its_makers_fault() {
    let bench = Bench::new();
    let mut odd = Honest::tracking().start(|request| match request.code {
        SET_INFLIGHT_FD => Act::Send(fake::message(request, &1u64.to_le_bytes()), Vec::new()),
        _ => Act::Answer,
    });
    bench.attached(&mut odd);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    assert!(bench.lost().starts_with("SET_INFLIGHT_FD: "));
    assert!(!bench.device.has_failed());
}

#[test]
fn a_backend_that_is_detached_has_stopped_and_its_successor_goes_on() {
    let bench = Bench::new();
    let mut first = Honest::tracking().serve();
    bench.attached(&mut first);
    bench.device.start(activation(&[queue(128), queue(128)]));
    bench.quiet();
    let region = find(&first.heard(), SET_INFLIGHT_FD).inode();
    bench.device.command(Command::Detach);
    assert!(matches!(bench.event("Detached"), Event::Detached(_)));
    assert_eq!(codes(&first.heard()), [GET_VRING_BASE, GET_VRING_BASE]);
    first.closed();
    // Once more is no harm.
    bench.device.command(Command::Detach);
    assert!(matches!(bench.event("Detached"), Event::Detached(_)));
    bench.set_used_index(3);
    let mut second = Honest::tracking().serve();
    bench.attached(&mut second);
    let requests = second.heard();
    assert_eq!(find(&requests, SET_INFLIGHT_FD).inode(), region);
    assert_eq!(find(&requests, SET_VRING_BASE).word(4), 3);
    // A reset does not wait for one that has been let go of.
    bench.device.command(Command::Detach);
    assert!(matches!(bench.event("Detached"), Event::Detached(_)));
    assert!(answered(&bench.reset()));
    bench.quiet();
}

#[test]
fn a_backend_that_does_not_play_its_part_in_a_detach_is_lost() {
    let bench = Bench::new();
    let mut backend = Honest::default().start(|request| {
        if request.code == GET_VRING_BASE {
            Act::Send(fake::message(request, &[0; 3]), Vec::new())
        } else {
            Act::Answer
        }
    });
    bench.attached(&mut backend);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    bench.device.command(Command::Detach);
    backend.until(GET_VRING_BASE);
    backend.die();
    assert!(bench.lost().starts_with("GET_VRING_BASE: "));
    bench.device.command(Command::Detach);
    bench.quiet();
}

#[test]
fn a_broken_device_is_whole_again_after_the_drivers_reset() {
    let bench = Bench::new();
    let mut first = Honest::tracking().serve();
    bench.attached(&mut first);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    bench.quiet();
    let region = find(&first.heard(), SET_INFLIGHT_FD).inode();
    let generation = bench.device.generation();
    // Once more is no harm: the driver is told once.
    bench.device.command(Command::Break);
    bench.device.command(Command::Break);
    bench.quiet();
    assert!(bench.device.has_failed());
    assert_eq!(bench.device.generation(), generation + 1);
    assert_eq!(codes(&first.heard()), [GET_VRING_BASE]);
    first.die();
    bench.device.command(Command::Gone);
    let mut second = Honest::tracking().serve();
    bench.attached(&mut second);
    assert_eq!(codes(&second.heard()), GREETING, "what was in flight is not carried out again");
    assert!(bench.device.stop(DEADLINE));
    bench.device.mend();
    assert!(!bench.device.has_failed());
    bench.set_used_index(7);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    let requests = second.until(SET_VRING_ENABLE);
    assert_eq!(find(&requests, SET_VRING_BASE).word(4), 0);
    assert_ne!(find(&requests, SET_INFLIGHT_FD).inode(), region);
}

impl Bench {
    /// Commands a pause or its end, and waits for it.
    fn pause(&self, command: Command) {
        self.device.command(command);
        assert!(matches!(self.event("QueuesDone"), Event::QueuesDone));
    }
}

#[test]
fn a_pause_stops_the_queues_and_keeps_what_is_in_flight() {
    let bench = Bench::new();
    let mut backend = Honest::tracking().serve();
    bench.attached(&mut backend);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    bench.quiet();
    let region = find(&backend.heard(), SET_INFLIGHT_FD).inode();
    bench.pause(Command::Pause);
    assert_eq!(codes(&backend.heard()), [GET_VRING_BASE]);
    bench.set_used_index(12);
    bench.pause(Command::Resume);
    let requests = backend.heard();
    assert_eq!(codes(&requests), [&[SET_FEATURES, SET_MEM_TABLE, SET_INFLIGHT_FD], &QUEUE[..]].concat());
    assert_eq!(find(&requests, SET_INFLIGHT_FD).inode(), region);
    assert_eq!(find(&requests, SET_VRING_BASE).word(4), 12);
}

#[test]
fn a_backend_that_is_attached_during_a_pause_starts_after_it() {
    let bench = Bench::new();
    // Without a backend there is nothing to stop.
    bench.pause(Command::Pause);
    bench.pause(Command::Resume);
    let mut first = Honest::default().serve();
    bench.attached(&mut first);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    bench.quiet();
    bench.pause(Command::Pause);
    first.die();
    bench.device.command(Command::Gone);
    let mut second = Honest::default().serve();
    bench.attached(&mut second);
    assert_eq!(codes(&second.heard()), GREETING);
    bench.device.command(Command::Detach);
    assert!(matches!(bench.event("Detached"), Event::Detached(_)));
    assert!(second.heard().is_empty(), "nothing runs that could be stopped");
    let mut third = Honest::default().serve();
    bench.attached(&mut third);
    third.heard();
    bench.pause(Command::Resume);
    let requests = third.heard();
    assert_eq!(codes(&requests), [&[SET_FEATURES, SET_MEM_TABLE], &QUEUE[..]].concat());
    assert_eq!(counter(&requests, SET_VRING_KICK), 1);
}

#[test]
fn a_pause_waits_for_a_backend_that_did_not_stop_until_it_is_gone() {
    let bench = Bench::new();
    let mut backend =
        Honest::default().start(|request| if request.code == GET_VRING_BASE { Act::Close } else { Act::Answer });
    bench.attached(&mut backend);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    bench.device.command(Command::Pause);
    assert!(bench.lost().starts_with("GET_VRING_BASE: "));
    bench.device.command(Command::Dead);
    bench.quiet();
    bench.device.command(Command::Gone);
    assert!(matches!(bench.event("QueuesDone"), Event::QueuesDone));
    bench.device.command(Command::Gone);
    bench.quiet();
    bench.pause(Command::Resume);
    bench.quiet();
}

#[test]
fn a_backend_may_take_longer_to_stop_its_queues_than_for_anything_else() {
    let bench = Bench::new();
    let mut backend =
        Honest::default().start(|request| if request.code == GET_VRING_BASE { Act::Silence } else { Act::Answer });
    bench.attached(&mut backend);
    bench.device.start(activation(&[queue(128), QueueState::default()]));
    bench.quiet();
    let reset = bench.reset();
    backend.until(GET_VRING_BASE);
    let now = Instant::now();
    bench.device.conversation().hang_up_if_overdue(now + 2 * PATIENCE);
    assert!(!bench.device.conversation().is_overdue());
    bench.device.conversation().hang_up_if_overdue(now + STOP_PATIENCE);
    assert!(bench.lost().starts_with("it did not answer within 25 s: "));
    bench.device.command(Command::Gone);
    assert!(answered(&reset));
}

#[test]
fn what_is_no_answer_to_a_message_is_none_and_no_harm() {
    type Garble = fn(&Request) -> Vec<u8>;
    let garbled: [Garble; 5] = [
        |request| fake::message(request, &[0; 8])[..15].to_vec(),
        |request| fake::message(request, &[])[..12].to_vec(),
        |request| [&fake::message(request, &[])[..8], &[0xff; 4]].concat(),
        |_| vec![0xff; 8192],
        |_| vec![0; 8192],
    ];
    for (garble, last) in
        garbled.into_iter().flat_map(|garble| (1..=GREETING.len() + 4 + QUEUE.len()).map(move |last| (garble, last)))
    {
        let bench = Bench::new();
        let mut count = 0;
        let mut failing = Honest::tracking().start(move |request| {
            count += 1;
            match count {
                _ if count < last => Act::Answer,
                _ if count == last => Act::Send(garble(request), Vec::new()),
                _ => Act::Silence,
            }
        });
        bench.attach(&mut failing);
        bench.device.start(activation(&[queue(128), QueueState::default()]));
        // The first request asks for no answer: the next one gets what was sent for it.
        for _ in 0..last.max(2) {
            failing.next("request");
        }
        bench.device.conversation().hang_up_if_overdue(Instant::now() + 2 * PATIENCE);
        match bench.event("Attached or Lost") {
            Event::Lost(..) => assert!(last <= GREETING.len(), "message {last}"),
            Event::Attached(_) => drop(bench.lost()),
            other => panic!("message {last}: {other:?}"),
        }
        bench.quiet();
        bench.attached(&mut Honest::tracking().serve());
    }
}

#[test]
fn a_queue_goes_on_if_a_backend_may_have_served_it_and_else_begins_at_nought() {
    for (last, bases) in [(SET_VRING_CALL, [0, 0]), (SET_VRING_KICK, [5, 0]), (SET_VRING_ENABLE, [5, 0])] {
        let bench = Bench::new();
        let mut first =
            Honest::default().start(move |request| if request.code == last { Act::Close } else { Act::Answer });
        bench.attached(&mut first);
        bench.device.start(activation(&[queue(128), queue(128)]));
        bench.lost();
        bench.set_used_index(5);
        let mut second = Honest::default().serve();
        bench.attached(&mut second);
        let requests = second.heard();
        let set = requests.iter().filter(|request| request.code == SET_VRING_BASE);
        assert_eq!(set.map(|request| request.word(4)).collect::<Vec<_>>(), bases, "it ended at request {last}");
    }
}
