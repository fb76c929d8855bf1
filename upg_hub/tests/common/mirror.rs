//! A small Hugging Face Hub on this machine, with faults on request.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// Commit of everything.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Deviations from a sound server.
#[derive(Default)]
pub(crate) struct Faults {
    /// Number of bodies of weights that end after `cut_after` bytes.
    pub(crate) cuts: usize,
    pub(crate) cut_after: usize,
    /// Number of answers with status 503.
    pub(crate) unavailable: usize,
    /// Status of every answer.
    pub(crate) status: Option<u16>,
    /// Changes a byte of weights.
    pub(crate) wrong: bool,
    /// Answers ranges with everything.
    pub(crate) ignores_ranges: bool,
    /// Address of another server that weights are redirected to.
    pub(crate) storage: Option<String>,
    /// The token that is needed.
    pub(crate) token: Option<String>,
    /// Descriptions of this many bytes, with their length or without.
    pub(crate) huge: Option<(u64, bool)>,
    /// Name in every list of files.
    pub(crate) odd_name: Option<String>,
    /// Wait before each chunk of a body.
    pub(crate) delay: Duration,
}

/// Request that was received.
#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

#[derive(Default)]
struct State {
    /// Files by `user/model/file`.
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    requests: Mutex<Vec<Request>>,
    faults: Mutex<Faults>,
}

/// Server, until the process ends.
#[derive(Clone)]
pub(crate) struct Mirror {
    address: SocketAddr,
    state: Arc<State>,
}

impl Mirror {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mirror = Self {
            address: listener.local_addr().unwrap(),
            state: Arc::default(),
        };
        let server = mirror.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let server = server.clone();
                // A client that goes away ends its connection only.
                thread::spawn(move || server.serve(stream?));
            }
        });
        mirror
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn add(&self, path: &str, content: impl Into<Vec<u8>>) {
        self.state
            .files
            .lock()
            .unwrap()
            .insert(path.to_owned(), content.into());
    }

    pub(crate) fn faults(&self) -> MutexGuard<'_, Faults> {
        self.state.faults.lock().unwrap()
    }

    /// Returns the requests so far, and forgets them.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.requests.lock().unwrap())
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let request = read_request(&stream)?;
        self.state.requests.lock().unwrap().push(request.clone());
        let mut faults = self.faults();
        let needed = faults.token.as_ref().map(|token| format!("Bearer {token}"));
        if faults.unavailable > 0 {
            faults.unavailable -= 1;
            return answer(&mut stream, 503, &["Retry-After: 0"], b"");
        }
        if let Some(status) = faults.status {
            return answer(&mut stream, status, &[], b"no");
        }
        if needed.is_some() && needed != request.authorization {
            return answer(&mut stream, 401, &[], b"");
        }
        drop(faults);
        let path = request.path.split('?').next().unwrap_or_default();
        match path.strip_prefix("/api/models/") {
            Some(rest) => self.describe(&mut stream, rest),
            None => self.send(&mut stream, path, &request),
        }
    }

    fn describe(&self, stream: &mut TcpStream, rest: &str) -> std::io::Result<()> {
        if let Some((bytes, is_stated)) = self.faults().huge {
            let length = format!("Content-Length: {bytes}\r\n");
            let length = if is_stated { length.as_str() } else { "" };
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\n{length}\r\n"
            )?;
            for _ in 0..bytes / 65536 {
                stream.write_all(&[b' '; 65536])?;
            }
            return Ok(());
        }
        let repository = rest.split("/revision/").next().unwrap_or_default();
        let revision = rest.split("/revision/").nth(1);
        let prefix = format!("{repository}/");
        let files = self.state.files.lock().unwrap();
        let own = files.iter().filter_map(|(path, content)| {
            let name = path.strip_prefix(&prefix)?;
            Some(format!(
                r#"{{"rfilename": "{name}", "size": {}}}"#,
                content.len()
            ))
        });
        let odd = self.faults().odd_name.clone();
        let odd = odd.map(|name| format!(r#"{{"rfilename": "{name}", "size": 1}}"#));
        let list: Vec<_> = own.chain(odd).collect();
        let is_known = revision.is_none_or(|r| r == "main" || r == COMMIT);
        if list.is_empty() || !is_known {
            return answer(stream, 404, &[], b"{}");
        }
        let text = format!(
            r#"{{"sha": "{COMMIT}", "siblings": [{}]}}"#,
            list.join(", ")
        );
        answer(
            stream,
            200,
            &["Content-Type: application/json"],
            text.as_bytes(),
        )
    }

    fn send(&self, stream: &mut TcpStream, path: &str, request: &Request) -> std::io::Result<()> {
        let key = path[1..].replace(&format!("/resolve/{COMMIT}"), "");
        let Some(mut content) = self.state.files.lock().unwrap().get(&key).cloned() else {
            return answer(stream, 404, &[], b"");
        };
        let is_large = key.ends_with(".safetensors") || key.ends_with(".gguf");
        let hash: String = Sha256::digest(&content)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let mut faults = self.faults();
        let hash = if is_large { &hash[..] } else { &hash[..40] };
        let etag = format!("ETag: \"{hash}\"");
        let linked = [
            format!("X-Linked-Etag: \"{hash}\""),
            format!("X-Linked-Size: {}", content.len()),
            format!("X-Repo-Commit: {COMMIT}"),
        ];
        let mut headers: Vec<&str> = vec![&etag];
        headers.extend(linked.iter().map(String::as_str));
        if is_large && let Some(storage) = &faults.storage {
            let location = format!("Location: {storage}/{key}");
            headers.push(&location);
            return answer(stream, 302, &headers, b"");
        }
        if is_large && faults.wrong {
            content[0] ^= 1;
        }
        if request.method == "HEAD" {
            return head(stream, 200, &headers, content.len());
        }
        let range = request.range.as_deref().filter(|_| !faults.ignores_ranges);
        let start = range.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let rest = &content[start.unwrap_or(0)..];
        let content_range = format!(
            "Content-Range: bytes {}-{}/{}",
            start.unwrap_or(0),
            content.len() - 1,
            content.len()
        );
        let status = if start.is_some() { 206 } else { 200 };
        if start.is_some() {
            headers.push(&content_range);
        }
        let is_cut = is_large && faults.cuts > 0 && rest.len() > faults.cut_after;
        let end = if is_cut { faults.cut_after } else { rest.len() };
        faults.cuts -= usize::from(is_cut);
        let delay = faults.delay;
        drop(faults);
        head(stream, status, &headers, rest.len())?;
        for chunk in rest[..end].chunks(4096) {
            thread::sleep(delay);
            stream.write_all(chunk)?;
        }
        Ok(())
    }
}

fn read_request(stream: &TcpStream) -> std::io::Result<Request> {
    let mut request = Request::default();
    for line in BufReader::new(stream).lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        match line.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("range") => {
                request.range = Some(value.to_owned());
            }
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                request.authorization = Some(value.to_owned());
            }
            Some(_) => {}
            None => {
                let mut parts = line.split(' ').map(str::to_owned);
                request.method = parts.next().unwrap_or_default();
                request.path = parts.next().unwrap_or_default();
            }
        }
    }
    Ok(request)
}

fn head(stream: &mut TcpStream, status: u16, headers: &[&str], len: usize) -> std::io::Result<()> {
    let mut text = format!("HTTP/1.1 {status} Status\r\nConnection: close\r\n");
    for header in headers {
        text += &format!("{header}\r\n");
    }
    write!(stream, "{text}Content-Length: {len}\r\n\r\n")
}

fn answer(
    stream: &mut TcpStream,
    status: u16,
    headers: &[&str],
    body: &[u8],
) -> std::io::Result<()> {
    head(stream, status, headers, body.len())?;
    stream.write_all(body)
}
