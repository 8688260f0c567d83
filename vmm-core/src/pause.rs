//! Pausing the machine: first its vCPUs are held, then its queues stopped; and back in the opposite order.
//!
//! Nothing here waits. Each step is begun by the main thread, and an event tells that it is done.

use std::collections::VecDeque;

/// What `ozone` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Pause the machine.
    Pause,
    /// Let it run.
    Resume,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Have every vCPU come out of the guest.
    HoldVcpus,
    /// Have every device's queues stopped.
    StopQueues,
    /// The machine is paused: say so.
    SayPaused,
    /// Have every device's queues started again.
    StartQueues,
    /// Let the vCPUs into the guest.
    ReleaseVcpus,
    /// The machine runs: say so.
    SayResumed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    HoldingVcpus,
    VcpusHeld,
    /// So many devices' queues have not stopped.
    StoppingQueues(usize),
    Paused,
    /// So many devices' queues have not started.
    StartingQueues(usize),
    Resuming,
}

/// Where the machine stands between running and paused.
#[derive(Debug)]
pub struct Pauses {
    devices: usize,
    phase: Phase,
    /// Each is answered, in order.
    requests: VecDeque<Request>,
}

impl Pauses {
    /// A machine with so many devices that is not paused.
    pub fn new(devices: usize) -> Self {
        Self { devices, phase: Phase::Running, requests: VecDeque::new() }
    }

    /// Takes a request.
    pub fn ask(&mut self, request: Request) {
        self.requests.push_back(request);
    }

    /// No vCPU is in the guest.
    pub fn vcpus_held(&mut self) {
        if self.phase == Phase::HoldingVcpus {
            self.phase = Phase::VcpusHeld;
        }
    }

    /// One device's queues have been stopped or started, or its backend is away.
    pub fn queues_done(&mut self) {
        if let Phase::StoppingQueues(left) | Phase::StartingQueues(left) = &mut self.phase {
            *left = left.saturating_sub(1);
        }
    }

    /// Whether vCPUs may be in the guest.
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// What is to be done now; nothing while an event is awaited.
    pub fn step(&mut self) -> Option<Step> {
        let (phase, step) = match self.phase {
            Phase::Running => match self.requests.pop_front()? {
                Request::Pause => (Phase::HoldingVcpus, Step::HoldVcpus),
                Request::Resume => (Phase::Running, Step::SayResumed),
            },
            Phase::VcpusHeld => (Phase::StoppingQueues(self.devices), Step::StopQueues),
            Phase::StoppingQueues(0) => (Phase::Paused, Step::SayPaused),
            Phase::Paused => match self.requests.pop_front()? {
                Request::Pause => (Phase::Paused, Step::SayPaused),
                Request::Resume => (Phase::StartingQueues(self.devices), Step::StartQueues),
            },
            Phase::StartingQueues(0) => (Phase::Resuming, Step::ReleaseVcpus),
            Phase::Resuming => (Phase::Running, Step::SayResumed),
            Phase::HoldingVcpus | Phase::StoppingQueues(_) | Phase::StartingQueues(_) => return None,
        };
        self.phase = phase;
        Some(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(pauses: &mut Pauses) -> Vec<Step> {
        std::iter::from_fn(|| pauses.step()).collect()
    }

    #[test]
    fn a_machine_pauses_and_resumes_in_opposite_orders() {
        let mut pauses = Pauses::new(2);
        pauses.ask(Request::Pause);
        assert_eq!(steps(&mut pauses), [Step::HoldVcpus]);
        assert!(!pauses.is_running());
        pauses.vcpus_held();
        assert_eq!(steps(&mut pauses), [Step::StopQueues]);
        pauses.queues_done();
        assert_eq!(steps(&mut pauses), []);
        pauses.queues_done();
        assert_eq!(steps(&mut pauses), [Step::SayPaused]);
        // A vCPU that came back from a reset and is held again.
        pauses.vcpus_held();
        assert_eq!(steps(&mut pauses), []);
        pauses.ask(Request::Resume);
        assert_eq!(steps(&mut pauses), [Step::StartQueues]);
        pauses.queues_done();
        pauses.queues_done();
        assert_eq!(steps(&mut pauses), [Step::ReleaseVcpus, Step::SayResumed]);
        assert!(pauses.is_running());
    }

    #[test]
    fn every_request_is_answered_in_its_turn() {
        let mut pauses = Pauses::new(0);
        pauses.ask(Request::Resume);
        assert_eq!(steps(&mut pauses), [Step::SayResumed]);
        for request in [Request::Pause, Request::Pause, Request::Resume, Request::Pause] {
            pauses.ask(request);
        }
        assert_eq!(steps(&mut pauses), [Step::HoldVcpus]);
        pauses.vcpus_held();
        let to_the_second_pause = [
            Step::StopQueues,
            Step::SayPaused,
            Step::SayPaused,
            Step::StartQueues,
            Step::ReleaseVcpus,
            Step::SayResumed,
            Step::HoldVcpus,
        ];
        assert_eq!(steps(&mut pauses), to_the_second_pause);
        pauses.vcpus_held();
        assert_eq!(steps(&mut pauses), [Step::StopQueues, Step::SayPaused]);
    }
}
