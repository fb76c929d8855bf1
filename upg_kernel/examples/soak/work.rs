//! Pieces of work on a shared model, chosen at random from a seed.
#![forbid(unsafe_code)]

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use upg_kernel::inference::chat_template::{ChatTemplate, Message};
use upg_kernel::inference::{
    Context, Event, Logits, Sampler, SamplingOptions, Sequence, Session, SessionOptions,
};
use upg_kernel::{Error, ErrorKind, Result, UPGModel};

/// Names of the kinds of work. A model without a tokenizer uses ids instead of texts.
pub const KINDS: [&str; 9] = [
    "texts, to their end",
    "streams, dropped half way",
    "passes, interrupted",
    "sessions with errors",
    "batches, one sequence failing",
    "texts side by side, half of them dropped",
    "chat templates",
    "texts to ids and back",
    "sessions cut back and replaced",
];

/// Longest prompt, in tokens.
const MOST_PROMPT: u32 = 48;
/// Maximum tokens that are generated at a time.
const MOST_TOKENS: u32 = 12;

/// Template that only the fuel limit stops.
const ENDLESS: &str =
    "{% for i in range(9999) %}{% for j in range(9999) %}{{ j }}{% endfor %}{% endfor %}";
const PLAIN: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}";

/// One of the threads that use the model.
pub struct Worker {
    model: Arc<UPGModel>,
    random: ChaCha8Rng,
}

impl Worker {
    pub fn new(model: Arc<UPGModel>, random: ChaCha8Rng) -> Self {
        Self { model, random }
    }

    /// Fills the per-thread cache of the tokenizer.
    ///
    /// It holds up to 10,000 words, with which memory would otherwise grow for an hour.
    pub fn fill_caches(&self) -> Result<()> {
        let Ok(tokenizer) = self.model.tokenizer() else {
            return Ok(());
        };
        let letter = |number: u32| char::from(b'a' + (number % 26) as u8);
        let words = (0..20_000u32).flat_map(|n| {
            [
                ' ',
                letter(n),
                letter(n / 26),
                letter(n / 676),
                letter(n / 17_576),
            ]
        });
        tokenizer
            .encode(&words.collect::<String>(), false)
            .map(drop)
    }

    /// Does a piece of work and returns its kind. Errors: an unexpected failure or success.
    pub fn run(&mut self) -> Result<usize> {
        let kind = self.below(KINDS.len() as u32) as usize;
        let done = match kind {
            0 => self.generate(None),
            1 => self.generate(Some(3)),
            2 => self.interrupt(),
            3 => self.errors(),
            4 => self.batch(),
            5 => self.texts(),
            6 => self.template(),
            7 => self.tokenizer(),
            _ => self.replace(),
        };
        done.map(|()| kind)
            .map_err(|e| Error::new(e.kind(), format!("{}: {e}", KINDS[kind])))
    }

    fn below(&mut self, limit: u32) -> u32 {
        self.random.next_u32() % limit
    }

    /// Returns one token or more.
    fn tokens(&mut self, most: u32) -> Vec<u32> {
        let vocab = self.model.model().config().vocab_size as u32;
        let count = 1 + self.below(most);
        (0..count).map(|_| self.below(vocab)).collect()
    }

    fn sampler(&mut self) -> Result<Sampler> {
        Sampler::new(SamplingOptions {
            temperature: [0.0, 0.8][self.below(2) as usize],
            top_k: [0, 40][self.below(2) as usize],
            repetition_penalty: [1.0, 1.1][self.below(2) as usize],
            seed: self.random.next_u64(),
            ..SamplingOptions::default()
        })
    }

    fn session(&self) -> Result<Session> {
        self.model.session(&SessionOptions::default())
    }

    fn has_tokenizer(&self) -> bool {
        self.model.tokenizer().is_ok()
    }

    /// Runs a new scheduler with a prompt and up to `steps` passes of an answer.
    fn generate(&mut self, steps: Option<usize>) -> Result<()> {
        let mut scheduler = self.model.scheduler(1, &SessionOptions::default())?;
        let most = 1 + self.below(MOST_TOKENS) as usize;
        let prompt = self.tokens(MOST_PROMPT);
        let mut request = self.model.request(prompt, most);
        request.sampler = self.sampler()?;
        if self.has_tokenizer() {
            request.stop_strings = vec!["\n\n".to_owned()];
        }
        scheduler.submit(request)?;
        let mut steps = steps.unwrap_or(usize::MAX);
        while !scheduler.is_idle() && steps > 0 {
            steps -= 1;
            for (_, event) in scheduler.step() {
                if let Event::Failed(error, _) = event {
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Another thread interrupts the passes sooner or later;
    /// the sequence is then as before the pass.
    fn interrupt(&mut self) -> Result<()> {
        let flag = Arc::new(AtomicBool::new(false));
        let options = SessionOptions {
            interrupt: Some(Arc::clone(&flag)),
            prefill_chunk: 16,
            ..SessionOptions::default()
        };
        let mut session = self.model.session(&options)?;
        let prompt = self.tokens(MOST_PROMPT);
        let delay = Duration::from_micros(self.below(30_000).into());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(delay);
                flag.store(true, Ordering::Relaxed);
            });
            loop {
                let before = session.tokens().len();
                match session.prefill(&prompt) {
                    Ok(_) if session.tokens().len() + prompt.len() > session.context() => {
                        return Ok(());
                    }
                    Ok(_) => {}
                    Err(e) if e.kind() == ErrorKind::Interrupted => {
                        return expect(
                            session.tokens().len() == before,
                            "a pass that was stopped left tokens",
                        );
                    }
                    Err(e) => return Err(e),
                }
            }
        })?;
        flag.store(false, Ordering::Relaxed);
        session.truncate(0);
        session.step(prompt[0]).map(drop)
    }

    /// Makes calls that must fail, each leaving the sequence unchanged.
    fn errors(&mut self) -> Result<()> {
        let vocab = self.model.model().config().vocab_size as u32;
        let short = SessionOptions {
            context: Some(4),
            ..SessionOptions::default()
        };
        let mut session = self.model.session(&short)?;
        session.prefill(&[0, 1])?;
        let failing: [&[u32]; 4] = [&[0; 5], &[vocab], &[0, u32::MAX], &[]];
        for tokens in failing {
            expect(session.prefill(tokens).is_err(), "a bad call succeeded")?;
            expect(session.tokens() == [0, 1], "a bad call left tokens")?;
        }
        for context in [0, usize::MAX] {
            let options = SessionOptions {
                context: Some(context),
                ..SessionOptions::default()
            };
            expect(
                self.model.session(&options).is_err(),
                "a bad context was taken",
            )?;
        }
        let none = SamplingOptions {
            top_p: f32::NAN,
            ..SamplingOptions::default()
        };
        expect(Sampler::new(none).is_err(), "a bad sampler was made")?;
        session.step(self.below(vocab)).map(drop)
    }

    /// Runs several sequences in one pass. Then one of them cannot continue, and none does; then
    /// all can.
    fn batch(&mut self) -> Result<()> {
        let count = 2 + self.below(3) as usize;
        let mut context = Context::new(Arc::clone(self.model.model()), &SessionOptions::default())?;
        let mut sequences: Vec<_> = (0..count).map(|_| context.sequence()).collect();
        let prompts: Vec<_> = (0..count).map(|_| self.tokens(MOST_PROMPT / 2)).collect();
        let mut logits = Vec::new();
        let mut extend = |sequences: &mut [Sequence], tokens: &[&[u32]]| {
            let mut parts: Vec<_> = sequences.iter_mut().zip(tokens.iter().copied()).collect();
            context.extend(&mut parts, Logits::Last, &mut logits)
        };
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        extend(&mut sequences, &prompts)?;
        let mut failing = vec![&[0][..]; count];
        failing[self.below(count as u32) as usize] = &[u32::MAX];
        expect(
            extend(&mut sequences, &failing).is_err(),
            "a batch with a bad id succeeded",
        )?;
        let is_as_before = sequences
            .iter()
            .zip(&prompts)
            .all(|(s, p)| s.tokens() == *p);
        expect(is_as_before, "a batch that failed left tokens")?;
        (0..self.below(MOST_TOKENS))
            .try_for_each(|_| extend(&mut sequences, &vec![&[0][..]; count]))
    }

    /// Submits more requests than fit in a pass; half of the time they are dropped before they
    /// are done.
    fn texts(&mut self) -> Result<()> {
        let mut scheduler = self.model.scheduler(3, &SessionOptions::default())?;
        for _ in 0..3 + self.below(3) {
            let most = 1 + self.below(MOST_TOKENS) as usize;
            let prompt = self.tokens(MOST_PROMPT / 2);
            let mut request = self.model.request(prompt, most);
            request.sampler = self.sampler()?;
            request.log_probs = Some(2);
            if self.has_tokenizer() {
                request.stop_strings = vec!["the".to_owned()];
            }
            scheduler.submit(request)?;
        }
        let mut most = [4, usize::MAX][self.below(2) as usize];
        while !scheduler.is_idle() && most > 0 {
            for (id, event) in scheduler.step() {
                match event {
                    Event::Failed(error, _) => return Err(error),
                    Event::Text(_) if self.below(20) == 0 => drop(scheduler.cancel(id)),
                    _ => most = most.saturating_sub(1),
                }
            }
        }
        Ok(())
    }

    /// Renders the template of the model, a plain one, and one that only the fuel limit stops.
    fn template(&mut self) -> Result<()> {
        let content = format!("What is {} in words?", self.below(1000));
        let messages = [Message::new("user", content)];
        match self.model.chat_template() {
            Ok(template) => drop(template.render(&messages, true)?),
            Err(e) if e.kind() == ErrorKind::Missing => {}
            Err(e) => return Err(e),
        }
        ChatTemplate::new(PLAIN, None, None)?.render(&messages, true)?;
        expect(
            ChatTemplate::new("{% for %}", None, None).is_err(),
            "a bad template was taken",
        )?;
        let endless = ChatTemplate::new(ENDLESS, None, None)?;
        expect(
            endless.render(&messages, true).is_err(),
            "an endless template ended",
        )
    }

    /// Decodes ids and encodes the text again.
    fn tokenizer(&mut self) -> Result<()> {
        let ids = self.tokens(MOST_PROMPT);
        if !self.has_tokenizer() {
            return expect(self.model.tokenizer().is_err(), "no tokenizer");
        }
        let tokenizer = self.model.tokenizer()?;
        let text = tokenizer.decode(&ids, true)?;
        let mut stream = tokenizer.decode_stream(false);
        ids.iter().try_for_each(|&id| stream.push(id).map(drop))?;
        stream.finish()?;
        let again = tokenizer.encode(&text, false)?;
        expect(
            tokenizer.decode(&again, true)? == text,
            "a text did not come back from its ids",
        )
    }

    fn replace(&mut self) -> Result<()> {
        let (mut session, mut tokens) = (self.session()?, self.tokens(MOST_PROMPT));
        session.prefill(&tokens)?;
        session.truncate(tokens.len() / 2);
        tokens.truncate(tokens.len() / 2);
        tokens.extend(self.tokens(MOST_PROMPT / 4));
        session.replace(&tokens)?;
        expect(
            session.tokens() == tokens,
            "a sequence is not what replaced it",
        )
    }
}

fn expect(holds: bool, otherwise: &str) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Invalid, otherwise)),
    }
}
