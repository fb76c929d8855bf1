//! The Viterbi search: the chain of states whose levels come closest to the targets.
#![forbid(unsafe_code)]

use super::code::Code;
use super::forward::{self, Front, Stretch};
use super::simd::Isa;
use upg_kernel::trellis_code::{SHIFTS, STATE_BITS};
use upg_kernel::{Error, ErrorKind, Result};

/// Steps that are fixed at once by one walk back.
pub(super) const BLOCK: usize = 256;

/// Steps that the search looks ahead of the last one it fixes. Most ways back have met by then: 64
/// cost 0.02 dB at two bits and 0.01 at four, 256 nothing that can be measured. Where they have
/// not, a block is searched twice, so that a longer look-ahead takes no more time.
pub(super) const LOOK_AHEAD: usize = 256;

/// A squared unit of a level costs this many integer steps, times the weight; by bits a weight.
/// Chosen so that an average error costs about 115: rounding is then lost in the noise, and sums
/// of costs up to 570 times the average are told apart.
const COST_STEPS: [f32; 5] = [0.0, 0.0, 1.0, 4.0, 16.0];

/// A Viterbi search with its scratch memory: 2.4, 1.3, 0.9 MB at 2, 3, 4 bits a weight.
///
/// Time is linear in the targets, memory constant: the search goes in windows, of which it fixes
/// 256 steps at a time and looks at 256 more.
pub struct Search<'a> {
    code: &'a Code,
    isa: Isa,
    front: Front,
    /// Group minima before the first step.
    initial: Vec<i16>,
    /// Group minima and cost tables of the steps of the window, in a ring.
    minima: Vec<i16>,
    costs: Vec<i16>,
    weights: Vec<f32>,
    block: usize,
    look_ahead: usize,
}

impl<'a> Search<'a> {
    /// A search with the fastest code path of this machine.
    pub fn new(code: &'a Code) -> Self {
        Self::with_isa(code, Isa::best())
    }

    /// A search with a chosen code path; the states do not depend on it.
    pub fn with_isa(code: &'a Code, isa: Isa) -> Self {
        Self::with(code, isa, BLOCK, LOOK_AHEAD)
    }

    /// A search with a chosen code path and window, for measurements and tests. `block` is at
    /// least 1.
    pub fn with(code: &'a Code, isa: Isa, block: usize, look_ahead: usize) -> Self {
        // the walk back reads the minima of the step before the window, too
        let window = block.max(1) + look_ahead + 1;
        Self {
            code,
            isa,
            front: Front {
                ordered: Box::new([[0; _]; _]),
                least: i16::MIN,
            },
            initial: vec![0; forward::groups(code.k())],
            minima: vec![0; window * forward::groups(code.k())],
            costs: vec![0; window * forward::step_costs(code.float_levels().len())],
            weights: Vec::new(),
            block: block.max(1),
            look_ahead,
        }
    }

    /// Finds states for `targets` that minimize `sum of weights[i] * (targets[i] - level[i])^2` and
    /// writes the first `states.len()` of them.
    ///
    /// - `start` is the state of the weight before the first target, which fixes the low
    ///   `13 - k` bits of the first state; `None` leaves it free.
    /// - `targets` are in units of a level. Those beyond `states.len()` are looked at, not encoded.
    /// - `weights` are about 1 on average and never negative; 0 means that any level will do.
    /// - The last state written is the `start` of what comes next.
    ///
    /// The chain is valid whatever the values are; not finite ones give any level. The same input
    /// gives the same states on every machine.
    ///
    /// Errors (`Argument`): `targets` and `weights` differ in length, or are shorter than `states`.
    pub fn run(
        &mut self,
        start: Option<u16>,
        targets: &[f32],
        weights: &[f32],
        states: &mut [u16],
    ) -> Result<()> {
        if targets.len() != weights.len() || targets.len() < states.len() {
            return Err(Error::new(
                ErrorKind::Argument,
                format!(
                    "{} targets and {} weights for {} states",
                    targets.len(),
                    weights.len(),
                    states.len()
                ),
            ));
        }
        let start = start.map(|state| state % (1 << STATE_BITS));
        self.begin(start);
        // `last` is the state before step `fixed`; `fresh` says that the front began there
        let (mut fixed, mut done, mut last, mut fresh) = (0, 0, start, true);
        while fixed < states.len() {
            let end = targets.len().min(fixed + self.block + self.look_ahead);
            self.forward(done, &targets[done..end], &weights[done..end]);
            done = end;
            let now = match end == targets.len() {
                true => states.len(),
                false => states.len().min(fixed + self.block),
            };
            let imposed = last.filter(|_| fresh);
            self.walk_back(fixed, end, imposed, &mut states[fixed..now]);
            let shared = u32::from(self.code.k());
            if last
                .is_some_and(|last| last >> shared != states[fixed] % (1 << (STATE_BITS - shared)))
            {
                // the cheapest way does not pass through what is fixed: search on from there only
                self.begin(last);
                (done, fresh) = (fixed, true);
                continue;
            }
            last = Some(states[now - 1]);
            (fixed, fresh) = (now, false);
        }
        Ok(())
    }

    /// The code that it searches.
    pub fn code(&self) -> &'a Code {
        self.code
    }

    fn window(&self) -> usize {
        self.block + self.look_ahead + 1
    }

    /// All ways are open, or only those on from `start`.
    fn begin(&mut self, start: Option<u16>) {
        let k = self.code.k();
        self.front.least = i16::MIN;
        match start {
            None => self.initial.fill(i16::MIN),
            Some(state) => {
                self.initial.fill(i16::MAX);
                let group = usize::from(state) >> k;
                self.initial[forward::group_index(k, group)] = i16::MIN;
            }
        }
        forward::order(k, &self.initial, &mut self.front.ordered);
    }

    /// Takes the front over `targets`, of which the first is number `first`.
    fn forward(&mut self, first: usize, targets: &[f32], weights: &[f32]) {
        let groups = forward::groups(self.code.k());
        let step_costs = forward::step_costs(self.code.float_levels().len());
        let cost_steps = COST_STEPS[usize::from(self.code.k())];
        let (mut at, mut left) = (first % self.window(), 0..targets.len());
        while !left.is_empty() {
            let n = left.len().min(self.window() - at);
            let now = left.start..left.start + n;
            self.weights.clear();
            self.weights
                .extend(weights[now.clone()].iter().map(|w| w * cost_steps));
            let mut stretch = Stretch {
                code: self.code,
                targets: &targets[now],
                weights: &self.weights,
                minima: &mut self.minima[at * groups..(at + n) * groups],
                costs: &mut self.costs[at * step_costs..(at + n) * step_costs],
            };
            self.isa.run(&mut self.front, &mut stretch);
            at = 0;
            left.start += n;
        }
    }

    /// Walks from the cheapest state of step `end - 1` back to step `first` and writes the states
    /// of the steps from `first` on. `last` is the state of step `first - 1`, where the front
    /// began, if it did not begin anywhere.
    ///
    /// The bits that the first states share with `last` are imposed, not hoped for: costs that
    /// saturate cannot lead to another state.
    fn walk_back(&self, first: usize, end: usize, last: Option<u16>, states: &mut [u16]) {
        let k = self.code.k();
        let bits = usize::from(k);
        // of a state `age` steps after `last`: its low bits that `last` fixes, and their number
        let imposed = |age: usize| match last {
            Some(last) if age * bits < STATE_BITS as usize => (
                usize::from(last) >> (age * bits),
                STATE_BITS as usize - age * bits,
            ),
            _ => (0, 0),
        };
        // the low bits of the state after the last one
        let minima = self.minima_of(end - 1);
        let (low, count) = imposed(end - first + 1);
        let mut group = (0..minima.len())
            .filter(|g| g & ((1 << count) - 1) == low)
            .min_by_key(|&g| minima[forward::group_index(k, g)])
            .unwrap_or(low);
        for step in (first..end).rev() {
            let (low, count) = imposed(step - first + 1);
            let mask = (1 << count.min(bits)) - 1;
            let minima = match step {
                0 => &self.initial,
                _ => self.minima_of(step - 1),
            };
            let costs = self.costs_of(step);
            let (mut state, mut least) = (group << bits | low & mask, i32::MAX);
            for member in (group << bits..(group + 1) << bits).filter(|s| s & mask == low & mask) {
                let before = minima[forward::group_index(k, member % minima.len())];
                let shift = usize::from(self.code.shifts()[member % SHIFTS]);
                // as the front added them, saturating
                let cost = i32::from(before.saturating_add(costs[shift + member / SHIFTS]));
                if cost < least {
                    (state, least) = (member, cost);
                }
            }
            if let Some(out) = states.get_mut(step - first) {
                *out = state as u16;
            }
            group = state % self.initial.len();
        }
    }

    fn minima_of(&self, step: usize) -> &[i16] {
        let (n, at) = (self.initial.len(), step % self.window());
        &self.minima[at * n..(at + 1) * n]
    }

    fn costs_of(&self, step: usize) -> &[i16] {
        let n = forward::step_costs(self.code.float_levels().len());
        let at = step % self.window();
        &self.costs[at * n..(at + 1) * n]
    }
}
