//! Networks by CNI plugins: <https://www.cni.dev/docs/spec>, versions 0.3.0 to 1.1.0.
//!
//! The configuration is read anew whenever it is needed, so a change counts from the next pod on.
//! A pod leaves its network by the configuration that it entered it with.

mod arguments;
mod cache;
mod list;
mod orphan;
mod plugin;
mod reply;
mod template;

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bulkhead_cri_api::v1 as cri;
use serde_json::{Map, Value, json};

use super::error::NetworkError;
use super::subnets::Pair;
use super::{POD_LINK, blocking};
use arguments::Arguments;
use cache::{Attachment, Cache};
use list::{NetworkList, Plugin};
use plugin::{About, Operation};
pub use reply::Promise;

/// How long a plugin may take to say whether it is ready: clients wait for that often.
const STATUS_LIMIT: Duration = Duration::from_secs(5);
/// How many pods are looked at together.
const TOGETHER: usize = 8;

/// Why CNI gives no network.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// A file or directory of the configuration cannot be read.
    #[error("CNI configuration {file}: {source}", file = file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is a directory, and nothing in it.
    #[error(
        "there is no network in {0} yet: install a CNI network, or remove the directory to \
             have the embedded bridge"
    )]
    NoNetwork(PathBuf),
    /// A file makes no sense.
    #[error("CNI configuration {file}: {why}", file = file.display())]
    Configuration {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A plugin is not installed.
    #[error("the CNI plugin {program} is in none of {}; install it", show(places))]
    NoProgram {
        /// The name of its program.
        program: String,
        /// Where it was looked for.
        places: Vec<PathBuf>,
    },
    /// A plugin failed.
    #[error("the CNI plugin {program} failed at {operation}: {why}")]
    Plugin {
        /// The name of its program.
        program: String,
        /// What was asked of it.
        operation: &'static str,
        /// In its words.
        why: String,
    },
    /// The pod cannot be told to plugins.
    #[error("the pod cannot have a CNI network: {0}")]
    Pod(String),
    /// What was promised is not so.
    #[error("the CNI network {network} is not what its plugins promise: {why}")]
    Broken {
        /// The name of the network.
        network: String,
        /// What is missing, or makes no sense.
        why: String,
    },
}

impl CniError {
    fn file(file: &Path, source: io::Error) -> Self {
        Self::File {
            file: file.to_owned(),
            source,
        }
    }
}

fn show(places: &[PathBuf]) -> String {
    let places: Vec<_> = places
        .iter()
        .map(|place| place.display().to_string())
        .collect();
    places.join(", ")
}

/// The CNI networks of one server.
#[derive(Debug, Clone)]
pub struct Cni {
    directory: PathBuf,
    template: Option<PathBuf>,
    programs: Vec<PathBuf>,
    /// For one call of one plugin; and for how long a pod stays whose plugins fail to take its
    /// network back.
    limit: Duration,
    root: PathBuf,
    cache: Cache,
}

impl Cni {
    /// Of the server whose state is under `root`.
    pub fn new(config: super::Config, root: &Path) -> Self {
        Self {
            directory: config.cni,
            template: config.cni_template,
            programs: config.cni_plugins,
            limit: Duration::from_secs(config.cni_timeout_seconds.into()),
            root: root.to_owned(),
            cache: Cache::new(root.join("cni")),
        }
    }

    /// Ends what plugins of an earlier server still do for pods whose namespaces are in
    /// `namespaces`, before anything is asked of them anew. Blocks.
    pub fn end_orphans(&self, namespaces: &Path) {
        if !self.cache.sandboxes().is_empty() {
            orphan::end(namespaces);
        }
    }

    /// Whether this machine's pods are to have CNI networks: it has a directory for them, empty or
    /// not, or a template. Blocks.
    pub fn is_wanted(&self) -> bool {
        self.template.is_some() || self.directory.is_dir()
    }

    /// Writes the network that the template makes of what the kubelet has told, unless there is
    /// one.
    pub async fn tell(&self, networks: Pair) -> Result<(), NetworkError> {
        let Some(template) = self.template.clone() else {
            tracing::info!("no `cni_template` is configured: the network is others' to write");
            return Ok(());
        };
        let directory = self.directory.clone();
        let shown = directory.display().to_string();
        let written =
            blocking(move || Ok(template::write(&template, &directory, networks)?)).await?;
        match written {
            true => tracing::info!(directory = shown, "the network is written"),
            false => tracing::info!(directory = shown, "the network that is there is kept"),
        }
        Ok(())
    }

    /// Whether pods can have a network now; why not.
    pub async fn ready(&self) -> Result<(), NetworkError> {
        let this = self.clone();
        let looked = blocking(move || {
            let list = NetworkList::of_directory(&this.directory)?;
            for plugin in &list.plugins {
                plugin::find(&plugin.program, &this.programs)?;
            }
            Ok(list)
        });
        let list = looked.await?;
        if list.has_status() {
            for plugin in &list.plugins {
                let config = configuration(&list, plugin, None, None);
                let call = self.call(Operation::Status, plugin, None, config, STATUS_LIMIT);
                call.await?;
            }
        }
        Ok(())
    }

    /// Calls every plugin in order. After a failure [`Self::detach`] takes back what was done.
    pub async fn attach(
        &self,
        sandbox: &str,
        netns: &Path,
        pod: &cri::PodSandboxConfig,
    ) -> Result<Promise, NetworkError> {
        let (this, id, netns) = (self.clone(), sandbox.to_owned(), netns.to_owned());
        let pod = pod.clone();
        let mut attachment = blocking(move || {
            let told = Pair::told(&this.root)?;
            let arguments = Arguments::of(&id, &pod, told).map_err(CniError::Pod)?;
            let list = NetworkList::of_directory(&this.directory)?;
            warn_of_unheard(&list, &arguments);
            let attachment = Attachment {
                list,
                arguments,
                netns,
                result: Value::Null,
                failing_since: None,
                broken: None,
            };
            // Before the first plugin: what it does is found again after a crash.
            this.cache.save(&id, &attachment)?;
            Ok(attachment)
        })
        .await?;
        for plugin in &attachment.list.plugins {
            let answer = self
                .step(Operation::Add, sandbox, &attachment, plugin)
                .await?;
            attachment.result = answer;
        }
        let network = attachment.list.name.clone();
        let mut promise = Promise::read(&attachment.result).map_err(|why| CniError::Broken {
            network: network.clone(),
            why: format!("the answer of the last plugin is wrong: {why}"),
        })?;
        if promise.addresses.is_empty() {
            let why = "they give the pod no address".to_owned();
            return Err(CniError::Broken { network, why }.into());
        }
        promise.sysctls = attachment.list.sysctls(POD_LINK);
        self.save(sandbox, attachment).await?;
        Ok(promise)
    }

    /// Calls every plugin in the reverse order, if the sandbox was attached; whether it was. All
    /// are called; the first failure is told. When they have failed for as long as one call of a
    /// plugin may take, the pod goes all the same, and the attachment is kept for [`Self::collect`].
    pub async fn detach(&self, sandbox: &str) -> Result<bool, NetworkError> {
        let Some(mut attachment) = self.load(sandbox).await? else {
            return Ok(false);
        };
        let mut result = Ok(());
        for plugin in attachment.list.plugins.iter().rev() {
            let step = self.step(Operation::Del, sandbox, &attachment, plugin);
            result = result.and(step.await.map(drop));
        }
        if let Err(error) = result {
            let now = now();
            // A clock that was set back begins anew.
            let since = attachment.failing_since.filter(|since| *since <= now);
            let since = since.unwrap_or(now);
            attachment.failing_since = Some(since);
            self.save(sandbox, attachment).await?;
            if now - since < self.limit.as_secs() {
                return Err(error.into());
            }
            tracing::error!(
                sandbox, %error, seconds = now - since,
                "the pod's network may have left something behind on this host, which is tried again \
                 when the server starts"
            );
            return Ok(true);
        }
        let (cache, sandbox) = (self.cache.clone(), sandbox.to_owned());
        blocking(move || cache.remove(&sandbox)).await?;
        Ok(true)
    }

    /// The network of a sandbox and what its plugins answered, for people; `Null` without one.
    pub async fn details(&self, sandbox: &str) -> Value {
        match self.load(sandbox).await {
            Ok(Some(attachment)) => json!({
                "network": attachment.list.name,
                "file": attachment.list.file,
                "result": attachment.result,
                "broken": attachment.broken,
            }),
            _ => Value::Null,
        }
    }

    /// Asks plugins whether the sandbox still has what they gave it, in the order of ADD, to the
    /// first that says no (CNI specification, section 4, "Checking"). That is written down.
    pub async fn check(&self, sandbox: &str) -> Result<(), NetworkError> {
        let Some(mut attachment) = self.load(sandbox).await? else {
            return Ok(());
        };
        // Only what was added to the end, and not taken back since, may be checked.
        let list = &attachment.list;
        if list.disable_check || !list.has_check() || attachment.result.is_null() {
            return Ok(());
        }
        let mut broken = Ok(());
        for plugin in &list.plugins {
            let step = self.step(Operation::Check, sandbox, &attachment, plugin);
            broken = step.await.map(drop);
            if broken.is_err() {
                break;
            }
        }
        let why = broken.as_ref().err().map(ToString::to_string);
        if attachment.broken != why {
            attachment.broken = why;
            self.save(sandbox, attachment).await?;
        }
        Ok(broken?)
    }

    /// Looks whether sandboxes still have their networks, several at a time. Failures are told to
    /// the log: a pod is not ended for them, since connections it has may go on, and since plugins
    /// are wrong at times (portmap 1.1.1 about every pod with ports of the host).
    pub async fn check_all(&self, sandboxes: &[String]) {
        self.each(sandboxes.to_vec(), |this, sandbox| async move {
            if let Err(error) = this.check(&sandbox).await {
                tracing::warn!(sandbox, %error, "a plugin finds that the pod's network is not what it was");
            }
        })
        .await;
    }

    /// Does something to sandboxes, several at a time.
    async fn each<F>(&self, sandboxes: Vec<String>, work: impl Fn(Self, String) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut waiting = sandboxes.into_iter();
        let mut running = tokio::task::JoinSet::new();
        loop {
            while running.len() < TOGETHER
                && let Some(sandbox) = waiting.next()
            {
                running.spawn(work(self.clone(), sandbox));
            }
            if running.join_next().await.is_none() {
                return;
            }
        }
    }

    /// Takes back the attachments of sandboxes that are not among `known`, and lets plugins find
    /// what else is nobody's. Failures are told to the log: nobody waits.
    pub async fn collect(&self, known: &[String]) {
        let cache = self.cache.clone();
        let attached = tokio::task::spawn_blocking(move || cache.sandboxes()).await;
        let (kept, left): (Vec<_>, Vec<_>) = attached
            .unwrap_or_default()
            .into_iter()
            .partition(|sandbox| known.contains(sandbox));
        self.each(left, |this, sandbox| async move {
            if let Err(error) = this.detach(&sandbox).await {
                tracing::warn!(sandbox, %error, "a network that no pod has was not taken back");
            }
        })
        .await;
        let directory = self.directory.clone();
        let list = blocking(move || Ok(NetworkList::of_directory(&directory)?)).await;
        let Ok(list) = list else {
            return; // The status says so.
        };
        if !list.has_status() || list.disable_gc {
            return;
        }
        let valid: Vec<Value> = kept
            .iter()
            .map(|sandbox| json!({"containerID": sandbox, "ifname": POD_LINK}))
            .collect();
        for plugin in &list.plugins {
            let mut config = configuration(&list, plugin, None, None);
            config["cni.dev/valid-attachments"] = valid.clone().into();
            let call = self.call(Operation::Gc, plugin, None, config, self.limit);
            if let Err(error) = call.await {
                tracing::warn!(%error, "what pods of earlier have left was not collected");
            }
        }
    }

    async fn step(
        &self,
        operation: Operation,
        sandbox: &str,
        attachment: &Attachment,
        plugin: &Plugin,
    ) -> Result<Value, CniError> {
        let list = &attachment.list;
        let about = About {
            container: sandbox,
            netns: &attachment.netns,
            interface: POD_LINK,
            arguments: &attachment.arguments.line,
        };
        let told = operation == Operation::Add || list.has_check();
        let before = Some(&attachment.result).filter(|result| told && !result.is_null());
        let config = configuration(list, plugin, Some(&attachment.arguments), before);
        self.call(operation, plugin, Some(about), config, self.limit)
            .await
    }

    async fn call(
        &self,
        operation: Operation,
        plugin: &Plugin,
        about: Option<About<'_>>,
        config: Value,
        limit: Duration,
    ) -> Result<Value, CniError> {
        let (program, places) = (&plugin.program, &self.programs);
        plugin::call(operation, program, places, about, &config, limit).await
    }

    async fn load(&self, sandbox: &str) -> Result<Option<Attachment>, NetworkError> {
        let (cache, sandbox) = (self.cache.clone(), sandbox.to_owned());
        blocking(move || cache.load(&sandbox)).await
    }

    async fn save(&self, sandbox: &str, attachment: Attachment) -> Result<(), NetworkError> {
        let (cache, sandbox) = (self.cache.clone(), sandbox.to_owned());
        blocking(move || cache.save(&sandbox, &attachment)).await
    }
}

/// Tells of what the pod asks of its network and no plugin is given: a network may do it by other
/// ways, as those do that run a program on every node.
fn warn_of_unheard(list: &NetworkList, arguments: &Arguments) {
    for (capability, what) in [
        ("portMappings", "ports of the host"),
        ("bandwidth", "limits of its bandwidth"),
    ] {
        let mut wanted = list.plugins.iter().flat_map(|plugin| &plugin.capabilities);
        if arguments.capabilities.contains_key(capability)
            && !wanted.any(|wanted| wanted == capability)
        {
            tracing::warn!(
                network = list.name,
                capability,
                "a pod asks for {what}, and no plugin of its network has the capability"
            );
        }
    }
}

/// Seconds since 1970, by a clock that goes on while no server runs.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// What one plugin of a list reads: its own part, and what the specification adds (section 3,
/// "Deriving execution configuration from plugin configuration").
fn configuration(
    list: &NetworkList,
    plugin: &Plugin,
    arguments: Option<&Arguments>,
    result: Option<&Value>,
) -> Value {
    let mut config: Map<String, Value> = plugin.config.clone();
    config.remove("capabilities");
    config.insert("cniVersion".to_owned(), list.version.clone().into());
    config.insert("name".to_owned(), list.name.clone().into());
    if let Some(arguments) = arguments {
        let runtime = arguments.runtime_config(&plugin.capabilities);
        if !runtime.is_empty() {
            config.insert("runtimeConfig".to_owned(), runtime.into());
        }
    }
    if let Some(result) = result {
        config.insert("prevResult".to_owned(), result.clone());
    }
    config.into()
}

#[cfg(test)]
mod tests;
