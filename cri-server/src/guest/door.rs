//! Where the guest's streams arrive: who they are is found out, and each goes to whoever waits.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bulkhead_agent_api::{GREETING_BYTES, Greeting, Purpose, Secret};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

/// Streams that may be undecided at once.
const STRANGERS: usize = 16;
/// How long a stream may take to greet.
const PATIENCE: Duration = Duration::from_secs(10);

type Arrival = (UnixStream, u64);

/// The streams of one guest.
#[derive(Debug)]
pub struct Door {
    secret: Secret,
    /// Whether the agent has the secret for good.
    sealed: AtomicBool,
    dialled: AtomicBool,
    control: Mutex<Option<UnixStream>>,
    arrived: Notify,
    tokens: AtomicU64,
    expected: Mutex<HashMap<u64, Expected>>,
}

#[derive(Debug)]
struct Expected {
    purpose: Purpose,
    arrival: oneshot::Sender<Arrival>,
}

/// A stream that is waited for; dropped, it is not any more.
pub struct Token {
    number: u64,
    door: Weak<Door>,
}

impl Token {
    /// The number the agent shows.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if let Some(door) = self.door.upgrade() {
            locked(&door.expected).remove(&self.number);
        }
    }
}

impl Door {
    /// No stream has come yet.
    pub fn new(secret: Secret, sealed: bool) -> Self {
        Self {
            secret,
            sealed: AtomicBool::new(sealed),
            dialled: AtomicBool::new(false),
            control: Mutex::new(None),
            arrived: Notify::new(),
            tokens: AtomicU64::new(1),
            expected: Mutex::new(HashMap::new()),
        }
    }

    /// Gives the secret to nobody any more.
    pub fn seal(&self) {
        self.sealed.store(true, Ordering::Release);
    }

    /// Whether any stream has come.
    pub fn has_dialled(&self) -> bool {
        self.dialled.load(Ordering::Acquire)
    }

    /// The next control stream; of several the newest.
    pub async fn control(&self) -> UnixStream {
        loop {
            let arrived = self.arrived.notified();
            if let Some(stream) = locked(&self.control).take() {
                return stream;
            }
            arrived.await;
        }
    }

    /// Announces a stream.
    pub fn expect(self: &Arc<Self>, purpose: Purpose) -> (Token, oneshot::Receiver<Arrival>) {
        let number = self.tokens.fetch_add(1, Ordering::Relaxed);
        let (arrival, arrived) = oneshot::channel();
        locked(&self.expected).insert(number, Expected { purpose, arrival });
        let door = Arc::downgrade(self);
        (Token { number, door }, arrived)
    }

    async fn admit(&self, mut stream: UnixStream) -> Result<(), String> {
        let mut bytes = [0; GREETING_BYTES];
        let read = stream.read_exact(&mut bytes).await;
        read.map_err(|error| error.to_string())?;
        let greeting = Greeting::decode(&bytes).map_err(|error| error.to_string())?;
        let knows = greeting.secret.matches(&self.secret);
        let newborn = greeting.purpose == Purpose::Control
            && greeting.secret.matches(&Secret::NONE)
            && !self.sealed.load(Ordering::Acquire);
        if newborn {
            let given = stream.write_all(&self.secret.0).await;
            given.map_err(|error| error.to_string())?;
        } else if !knows {
            return Err("it does not know the guest's secret".to_owned());
        }
        self.dialled.store(true, Ordering::Release);
        match greeting.purpose {
            Purpose::Control => {
                *locked(&self.control) = Some(stream);
                self.arrived.notify_one();
                Ok(())
            }
            purpose => {
                let mut expected = locked(&self.expected);
                let matches = expected.get(&greeting.token);
                if matches.is_none_or(|expected| expected.purpose != purpose) {
                    return Err(format!("nobody waits for its token {}", greeting.token));
                }
                if let Some(expected) = expected.remove(&greeting.token) {
                    // Whoever waited may have given up; then the stream closes.
                    let _ = expected.arrival.send((stream, greeting.offset));
                }
                Ok(())
            }
        }
    }
}

/// Admits streams until they end or the guest is given up.
pub async fn keep(door: Weak<Door>, mut streams: mpsc::Receiver<UnixStream>) {
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    while let Some(stream) = streams.recv().await {
        let Some(door) = door.upgrade() else {
            return;
        };
        let Ok(permit) = Arc::clone(&strangers).try_acquire_owned() else {
            tracing::warn!("a guest opens too many streams; one is closed");
            continue;
        };
        // Ends by itself within PATIENCE.
        tokio::spawn(async move {
            let _permit = permit;
            match tokio::time::timeout(PATIENCE, door.admit(stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(reason)) => tracing::warn!(%reason, "a guest's stream is closed"),
                Err(_) => tracing::warn!("a guest's stream that says nothing is closed"),
            }
        });
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: Secret = Secret([7; 32]);

    fn greeting(purpose: Purpose, secret: Secret, token: u64) -> [u8; GREETING_BYTES] {
        let offset = 5;
        let greeting = Greeting {
            purpose,
            secret,
            token,
            offset,
        };
        greeting.encode()
    }

    async fn admit(door: &Door, bytes: &[u8]) -> (Result<(), String>, UnixStream) {
        let (mut guest, host) = UnixStream::pair().unwrap();
        guest.write_all(bytes).await.unwrap();
        (door.admit(host).await, guest)
    }

    #[tokio::test]
    async fn the_first_agent_is_given_the_secret_and_no_later_stranger() {
        let door = Door::new(SECRET, false);
        let newborn = greeting(Purpose::Control, Secret::NONE, 0);
        let (admitted, mut guest) = admit(&door, &newborn).await;
        admitted.unwrap();
        let mut given = [0; 32];
        guest.read_exact(&mut given).await.unwrap();
        assert_eq!(given, SECRET.0);
        door.control().await;
        door.seal();
        assert!(admit(&door, &newborn).await.0.is_err());
        let known = greeting(Purpose::Control, SECRET, 0);
        admit(&door, &known).await.0.unwrap();
    }

    #[tokio::test]
    async fn a_stream_goes_only_to_the_one_who_waits_for_it() {
        let door = Arc::new(Door::new(SECRET, true));
        let (token, arrival) = door.expect(Purpose::Output);
        let number = token.number();
        let input = greeting(Purpose::Input, SECRET, number);
        assert!(admit(&door, &input).await.0.is_err());
        let unknown = greeting(Purpose::Output, SECRET, number + 1);
        assert!(admit(&door, &unknown).await.0.is_err());
        let stranger = greeting(Purpose::Output, Secret::NONE, number);
        assert!(admit(&door, &stranger).await.0.is_err());
        let right = greeting(Purpose::Output, SECRET, number);
        admit(&door, &right).await.0.unwrap();
        assert_eq!(arrival.await.unwrap().1, 5);
        assert!(admit(&door, &right).await.0.is_err());
    }

    #[tokio::test]
    async fn nobody_waits_any_more_once_the_token_is_dropped() {
        let door = Arc::new(Door::new(SECRET, true));
        let (token, _arrival) = door.expect(Purpose::Output);
        let right = greeting(Purpose::Output, SECRET, token.number());
        drop(token);
        assert!(admit(&door, &right).await.0.is_err());
    }
}
