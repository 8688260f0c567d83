//! What `ozone run` prints of a loss, and of its end.

use std::time::Duration;

use super::device::Loss;
use super::machine::Machine;
use crate::report;
use crate::spec::policy::Restart;

impl Machine<'_> {
    /// Says what was lost, why, and what is done about it.
    pub(super) fn tell_loss(&mut self, place: usize) {
        let restart = self.spec_of(place).map(|spec| spec.policy.restart);
        let name = self.processes.name(place);
        let id = self.spec_of(place).map_or_else(String::new, |spec| spec.id.to_string());
        let Some(loss) = self.device(place).and_then(|device| device.loss.as_mut()) else { return };
        if std::mem::replace(&mut loss.told, true) {
            return;
        }
        let stays = restart == Some(Restart::Never) || (restart == Some(Restart::OnFailure) && loss.orderly);
        let next = if loss.by_hand {
            "it is replaced".to_owned()
        } else if stays {
            format!("it stays away until 'ozone restart NAME {id}'")
        } else if loss.delay.is_zero() {
            "it is started again at once".to_owned()
        } else {
            format!("it is started again in {}", milliseconds(loss.delay))
        };
        report::warn(&format!("[{name}] lost: {}; {next}", loss.cause));
    }

    /// Says that a device is back.
    pub(super) fn tell_back(&mut self, place: usize) {
        let name = self.processes.name(place);
        let Some(device) = self.device(place) else { return };
        let Some((loss, away)) = device.back.take() else { return };
        let requests = device.reexecuted;
        let restarts = self.setting.tallies.add(place.wrapping_sub(1), |_| {}).restarts;
        let Loss { cause, delay, by_hand, .. } = loss;
        let when =
            if by_hand || delay.is_zero() { "at once".to_owned() } else { format!("after {}", milliseconds(delay)) };
        let away = milliseconds(away);
        report::say(&format!(
            "[{name}] back after {away}: {cause}; started again {when}; {requests} requests carried out again (restart {restarts})"
        ));
    }
}

/// A time in words: short ones with a digit behind the point.
fn milliseconds(time: Duration) -> String {
    let milliseconds = time.as_secs_f64() * 1e3;
    if milliseconds < 10.0 { format!("{milliseconds:.1} ms") } else { format!("{milliseconds:.0} ms") }
}
