//! Requests: redirects, the token, retries, bounded answers.
#![forbid(unsafe_code)]

use crate::settings::Settings;
use std::io::Read;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use upg_kernel::{Error, ErrorKind, Result};
use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

/// Maximum redirects of a request.
const MAX_REDIRECTS: usize = 8;

/// Maximum wait between attempts, also if the server asks for more.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// Maximum bytes of the headers of an answer; signed addresses have some thousands.
const MAX_HEADERS: usize = 64 << 10;

/// Interval in which a wait looks at the interrupt flag.
const TICK: Duration = Duration::from_millis(20);

/// Failure of one attempt.
pub(crate) enum Failure {
    /// Another attempt may succeed, after this time if the server says so.
    Retry(Error, Option<Duration>),
    Final(Error),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Final(e)
    }
}

/// Redirects that a request follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Follow {
    All,
    /// Only those on the endpoint: the answer that leaves it has the hash of the file.
    OnEndpoint,
}

/// Client of one endpoint.
pub(crate) struct Client {
    agent: Agent,
    settings: Settings,
    endpoint: Uri,
}

impl Client {
    /// Creates a client; connects to nothing. Errors (`Argument`): no endpoint of HTTP.
    pub(crate) fn new(settings: Settings) -> Result<Self> {
        let endpoint = settings.endpoint.parse::<Uri>().ok().filter(is_http);
        let endpoint = endpoint.ok_or_else(|| {
            let message = format!("'{}' is no address of a server", settings.endpoint);
            Error::new(ErrorKind::Argument, message).hint("set HF_ENDPOINT to https://HOST")
        })?;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("upg/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .max_response_header_size(MAX_HEADERS)
            .timeout_connect(Some(settings.timeout))
            .timeout_resolve(Some(settings.timeout))
            .timeout_per_read(Some(settings.timeout))
            .timeout_per_write(Some(settings.timeout))
            .build();
        Ok(Self {
            agent: config.new_agent(),
            settings,
            endpoint,
        })
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns the address of a path on the endpoint, whose parts are escaped.
    pub(crate) fn address(&self, parts: &[&str]) -> Result<Uri> {
        let mut address = self.settings.endpoint.clone();
        for part in parts {
            address.push('/');
            address += part;
        }
        let parsed = address.parse();
        parsed.map_err(|_| Error::new(ErrorKind::Argument, format!("bad address {address}")))
    }

    /// Gets a text of at most `most` bytes, with retries.
    ///
    /// Errors: `TooLarge`; `Malformed` if it is not UTF-8; those of the status.
    pub(crate) fn text(&self, address: &Uri, most: u64, retry: &dyn Fn(&Error)) -> Result<String> {
        let mut attempts = Attempts::new(&self.settings);
        loop {
            match self.text_once(address, most) {
                Ok(text) => return Ok(text),
                Err(failure) => attempts.failed(failure, retry)?,
            }
        }
    }

    fn text_once(&self, address: &Uri, most: u64) -> Result<String, Failure> {
        let too_large = || {
            let message = format!(
                "an answer of more than {most} bytes from {}",
                shown(address)
            );
            Failure::Final(Error::new(ErrorKind::TooLarge, message))
        };
        let answer = self.send(address, Method::Get, None, Follow::All)?;
        let answer = self.successful(answer, address)?;
        if answer.body().content_length().is_some_and(|n| n > most) {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        let mut body = answer.into_body().into_reader().take(most + 1);
        let read = body.read_to_end(&mut bytes);
        read.map_err(|e| Failure::Retry(cut(address, &e.to_string()), None))?;
        if bytes.len() as u64 > most {
            return Err(too_large());
        }
        String::from_utf8(bytes).map_err(|_| {
            let message = format!("{} answered something else than text", shown(address));
            Failure::Final(Error::new(ErrorKind::Malformed, message))
        })
    }

    /// Asks for the headers of a file: those of the endpoint, not of the storage behind it.
    pub(crate) fn headers(&self, address: &Uri) -> Result<HeaderMap, Failure> {
        let answer = self.send(address, Method::Head, None, Follow::OnEndpoint)?;
        match answer.status().is_redirection() {
            true => Ok(answer.into_parts().0.headers),
            false => Ok(self.successful(answer, address)?.into_parts().0.headers),
        }
    }

    /// Asks for the bytes of a file from `start` on.
    ///
    /// Status 206: from there; 200: from the beginning; 416: there are no such bytes.
    pub(crate) fn bytes(&self, address: &Uri, start: u64) -> Result<Response<Body>, Failure> {
        let range = (start > 0).then(|| format!("bytes={start}-"));
        let answer = self.send(address, Method::Get, range.as_deref(), Follow::All)?;
        match answer.status() == StatusCode::RANGE_NOT_SATISFIABLE && start > 0 {
            true => Ok(answer),
            false => self.successful(answer, address),
        }
    }

    fn send(
        &self,
        address: &Uri,
        method: Method,
        range: Option<&str>,
        follow: Follow,
    ) -> Result<Response<Body>, Failure> {
        let mut target = address.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = match method {
                Method::Get => self.agent.get(&target),
                Method::Head => self.agent.head(&target),
            };
            if let Some(range) = range {
                request = request.header(header::RANGE, range);
            }
            if let Some(token) = self.settings.token.as_deref()
                && same_origin(&target, &self.endpoint)
            {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let answer = request.call().map_err(|e| unreachable(&target, e))?;
            let location = answer.headers().get(header::LOCATION);
            let location = location.filter(|_| answer.status().is_redirection());
            let Some(location) = location else {
                return Ok(answer);
            };
            let next = redirected(&target, location.to_str().unwrap_or_default())?;
            if follow == Follow::OnEndpoint && !same_origin(&next, &self.endpoint) {
                return Ok(answer);
            }
            target = next;
        }
        let message = format!(
            "more than {MAX_REDIRECTS} redirects from {}",
            shown(address)
        );
        Err(Error::new(ErrorKind::Malformed, message).into())
    }

    /// Returns the answer, or the error of its status.
    fn successful(&self, answer: Response<Body>, address: &Uri) -> Result<Response<Body>, Failure> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let place = shown(address);
        let error = |kind, message: String| Error::new(kind, message);
        let wait = || {
            let seconds = answer.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
            seconds.trim().parse().ok().map(Duration::from_secs)
        };
        Err(match status.as_u16() {
            401 | 403 => error(ErrorKind::Io, format!("{place}: no access (status {status})"))
                .hint(match self.settings.token {
                    None => "does it exist? Private and gated models need HF_TOKEN, or a file with the token that `hf auth login` writes",
                    Some(_) => "does it exist? A gated model has to be asked for on its page on the Hub, with the account of the token",
                })
                .into(),
            404 | 410 => error(ErrorKind::Missing, format!("{place}: not found"))
                .hint("check the name and the revision")
                .into(),
            408 | 429 | 500 | 502 | 503 | 504 => {
                Failure::Retry(error(ErrorKind::Io, format!("{place}: status {status}")), wait())
            }
            _ => error(ErrorKind::Io, format!("{place}: status {status}")).into(),
        })
    }
}

#[derive(Clone, Copy)]
enum Method {
    Get,
    Head,
}

/// Counter of attempts in sequence that brought nothing.
pub(crate) struct Attempts<'a> {
    settings: &'a Settings,
    failed: u32,
}

impl<'a> Attempts<'a> {
    pub(crate) fn new(settings: &'a Settings) -> Self {
        Self {
            settings,
            failed: 0,
        }
    }

    /// Starts to count again, because an attempt brought something.
    pub(crate) fn succeeded(&mut self) {
        self.failed = 0;
    }

    /// Waits for the next attempt; `retry` gets the reason.
    ///
    /// Errors: that of the failure, if there is no next attempt; `Interrupted`.
    pub(crate) fn failed(&mut self, failure: Failure, retry: &dyn Fn(&Error)) -> Result<()> {
        let (error, asked) = match failure {
            Failure::Final(e) => return Err(e),
            Failure::Retry(error, asked) => (error, asked),
        };
        self.failed += 1;
        if self.failed >= self.settings.attempts {
            return Err(error.hint(format!(
                "gave up after {} attempts; the same command resumes",
                self.failed
            )));
        }
        retry(&error);
        let doubled = self
            .settings
            .backoff
            .saturating_mul(1 << (self.failed - 1).min(16));
        pause(self.settings, asked.unwrap_or(doubled).min(MAX_WAIT))
    }
}

/// Waits. Errors: `Interrupted`.
pub(crate) fn pause(settings: &Settings, time: Duration) -> Result<()> {
    let start = Instant::now();
    loop {
        check_interrupt(settings)?;
        match time.checked_sub(start.elapsed()) {
            None | Some(Duration::ZERO) => return Ok(()),
            Some(left) => std::thread::sleep(left.min(TICK)),
        }
    }
}

/// Returns an error of kind `Interrupted` if the flag is set.
pub(crate) fn check_interrupt(settings: &Settings) -> Result<()> {
    let flag = settings.interrupt.as_ref();
    match flag.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
        true => Err(Error::new(ErrorKind::Interrupted, "interrupted")
            .hint("the same command resumes the download")),
        false => Ok(()),
    }
}

/// Returns the error of a connection that ended too early.
pub(crate) fn cut(address: &Uri, why: &str) -> Error {
    let message = format!("the connection to {} was cut: {why}", host(address));
    Error::new(ErrorKind::Io, message)
}

fn unreachable(address: &Uri, e: ureq::Error) -> Failure {
    use ureq::Error as E;
    let message = format!("cannot reach {}: {e}", host(address));
    let is_final = matches!(
        e,
        E::Tls(_)
            | E::Rustls(_)
            | E::Pem(_)
            | E::BadUri(_)
            | E::Http(_)
            | E::InvalidProxyUrl
            | E::LargeResponseHeader(..)
            | E::Protocol(_)
    );
    let error = Error::new(ErrorKind::Io, message).with_source(e);
    match is_final {
        true => Failure::Final(error),
        false => Failure::Retry(error, None),
    }
}

/// Returns the target of a redirect. Errors (`Malformed`): no address, or one without encryption
/// from one with it.
fn redirected(from: &Uri, location: &str) -> Result<Uri, Failure> {
    let host = || from.authority().map_or("", |a| a.as_str());
    let scheme = from.scheme_str().unwrap_or_default();
    let absolute = match location {
        l if l.starts_with("//") => format!("{scheme}:{l}"),
        l if l.starts_with('/') => format!("{scheme}://{}{l}", host()),
        l => l.to_owned(),
    };
    let target = absolute.parse::<Uri>().ok().filter(is_http);
    let target = target.filter(|t| scheme != "https" || t.scheme_str() == Some("https"));
    target.ok_or_else(|| {
        let message = format!(
            "{} redirects to an address that is not followed",
            shown(from)
        );
        Failure::Final(Error::new(ErrorKind::Malformed, message))
    })
}

fn is_http(address: &Uri) -> bool {
    matches!(address.scheme_str(), Some("http" | "https"))
        && address.host().is_some_and(|host| !host.is_empty())
}

/// Returns whether scheme, host and port are the same.
fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |u: &Uri| {
        u.port_u16().or(match u.scheme_str() {
            Some("https") => Some(443),
            _ => Some(80),
        })
    };
    let host = |u: &Uri| u.host().map(str::to_ascii_lowercase);
    a.scheme() == b.scheme() && host(a) == host(b) && port(a) == port(b)
}

fn host(address: &Uri) -> &str {
    address.host().unwrap_or_default()
}

/// Returns an address without its query, which may be a signature.
fn shown(address: &Uri) -> String {
    let scheme = address.scheme_str().unwrap_or_default();
    // Not the part before an @, which may be a password.
    let port = address.port().map_or(String::new(), |p| format!(":{p}"));
    format!("{scheme}://{}{port}{}", host(address), address.path())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn redirects_stay_encrypted() {
        let from = uri("https://hub/a/b?x");
        let to = |location| redirected(&from, location).ok().map(|u| u.to_string());
        assert_eq!(to("/c?d").as_deref(), Some("https://hub/c?d"));
        assert_eq!(to("//cdn/c").as_deref(), Some("https://cdn/c"));
        assert_eq!(to("https://cdn/c").as_deref(), Some("https://cdn/c"));
        for bad in ["http://cdn/c", "file:///etc/passwd", "", "c", "ftp://x/y"] {
            assert_eq!(to(bad), None, "{bad}");
        }
        assert!(redirected(&uri("http://a/"), "http://b/").is_ok());
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let hub = uri("https://hub");
        assert!(same_origin(&hub, &uri("https://HUB:443/x")));
        for other in [
            "http://hub",
            "https://hub:444",
            "https://hub.evil",
            "https://evil/hub",
        ] {
            assert!(!same_origin(&hub, &uri(other)), "{other}");
        }
    }

    #[test]
    fn messages_have_no_secrets() {
        assert_eq!(
            shown(&uri("https://me:secret@hub:8/a?sig=secret")),
            "https://hub:8/a"
        );
    }
}
