//! Chains of plugins that are scripts: each writes down what it was told.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::network::subnets::Choice;

/// A machine with plugins `one` and `two`.
struct Machine {
    directory: tempfile::TempDir,
    cni: Cni,
}

const ANSWER: &str = r#"{"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.2/24"}]}"#;

impl Machine {
    fn new(version: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("net.d")).unwrap();
        fs::create_dir(path("bin")).unwrap();
        let config = crate::network::Config {
            cni: path("net.d"),
            cni_plugins: vec![path("bin")],
            ..Default::default()
        };
        let cni = Cni::new(config, directory.path());
        let machine = Self { directory, cni };
        machine.configure(version, "first");
        for name in ["one", "two"] {
            machine.program(name, "echo \"$answer\"");
        }
        machine
    }

    fn configure(&self, version: &str, key: &str) {
        let text = json!({
            "cniVersion": version, "name": "net",
            "plugins": [{"type": "one", "key": key},
                        {"type": "two", "capabilities": {"portMappings": true}}]});
        let path = self.directory.path().join("net.d/10-net.conflist");
        fs::write(path, text.to_string()).unwrap();
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.directory.path().join("bin").join(name);
        let log = self.directory.path().join("log");
        let text = format!(
            "#!/bin/sh\nconfig=$(cat)\nanswer='{ANSWER}'\n\
             echo \"$CNI_COMMAND {name} $config\" >> {}\n{script}\n",
            log.display()
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What was asked of whom with which configuration, since the last look.
    fn calls(&self) -> Vec<(String, Value)> {
        let path = self.directory.path().join("log");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(&path);
        let call = |line: &str| {
            let (words, config) = line.split_at(line.find('{').unwrap());
            (
                words.trim().to_owned(),
                serde_json::from_str(config).unwrap(),
            )
        };
        text.lines().map(call).collect()
    }

    fn words(&self) -> Vec<String> {
        self.calls().into_iter().map(|(words, _)| words).collect()
    }

    async fn attach(&self) -> Result<Promise, NetworkError> {
        let netns = Path::new("/run/netns/abc");
        self.cni.attach("abc", netns, &Default::default()).await
    }
}

#[tokio::test]
async fn plugins_are_called_in_order_and_back() {
    let machine = Machine::new("1.0.0");
    let promise = machine.attach().await.unwrap();
    assert_eq!(promise.addresses[0].0.address.to_string(), "10.9.0.2");
    let calls = machine.calls();
    assert_eq!(calls[0].0, "ADD one");
    assert_eq!(calls[0].1["name"], "net");
    assert_eq!(calls[0].1.get("prevResult"), None);
    assert_eq!(calls[1].0, "ADD two");
    assert_eq!(calls[1].1["prevResult"]["ips"][0]["address"], "10.9.0.2/24");
    assert_eq!(calls[1].1.get("capabilities"), None);

    // A network that was configured anew is not the one that the pod is in.
    machine.configure("1.0.0", "second");
    assert!(machine.cni.detach("abc").await.unwrap());
    let calls = machine.calls();
    assert_eq!([&calls[0].0, &calls[1].0], ["DEL two", "DEL one"]);
    assert_eq!(calls[1].1["key"], "first");
    assert!(calls[1].1.get("prevResult").is_some());
    assert!(!machine.cni.detach("abc").await.unwrap());
}

#[tokio::test]
async fn what_was_begun_is_taken_back_after_a_crash() {
    let machine = Machine::new("1.0.0");
    machine.program("two", "kill -9 $$");
    let error = machine.attach().await.unwrap_err().to_string();
    assert!(error.contains("two") && error.contains("ADD"), "{error}");
    machine.program("two", "");
    machine.calls();
    machine.cni.collect(&["other".to_owned()]).await;
    assert_eq!(machine.words(), ["DEL two", "DEL one"]);
    assert!(!machine.cni.detach("abc").await.unwrap());
}

#[tokio::test]
async fn a_plugin_that_never_takes_back_does_not_keep_the_pod() {
    let machine = Machine::new("1.0.0");
    machine.attach().await.unwrap();
    machine.program("two", r#"echo '{"code": 11, "msg": "later"}'; exit 1"#);
    machine.calls();
    // However often it is asked within the time that a call may take.
    for _ in 0..5 {
        let error = machine.cni.detach("abc").await.unwrap_err().to_string();
        assert!(error.contains("later, code 11"), "{error}");
        // The others are asked all the same.
        assert_eq!(machine.words(), ["DEL two", "DEL one"]);
    }
    let mut attachment = machine.cni.load("abc").await.unwrap().unwrap();
    attachment.failing_since = attachment.failing_since.map(|since| since - 60);
    machine.cni.save("abc", attachment).await.unwrap();
    assert!(machine.cni.detach("abc").await.unwrap());
    // It is not forgotten: the next server asks again.
    machine.program("two", "");
    machine.calls();
    machine.cni.collect(&[]).await;
    assert_eq!(machine.words(), ["DEL two", "DEL one"]);
    assert!(!machine.cni.detach("abc").await.unwrap());
}

#[tokio::test]
async fn what_the_kubelet_told_is_told_to_plugins_that_ask() {
    let machine = Machine::new("1.0.0");
    let mut choice = Choice::open(machine.directory.path(), Pair::default()).unwrap();
    fs::create_dir(machine.directory.path().join("network")).unwrap();
    choice.tell(Pair::read("10.9.0.0/24").unwrap()).unwrap();
    let path = machine.directory.path().join("net.d/10-net.conflist");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("portMappings", "ipRanges")).unwrap();
    machine.attach().await.unwrap();
    let calls = machine.calls();
    assert_eq!(calls[0].1.get("runtimeConfig"), None);
    let expected = json!({"ipRanges": [[{"subnet": "10.9.0.0/24"}]]});
    assert_eq!(calls[1].1["runtimeConfig"], expected);
}

#[tokio::test]
async fn a_promise_without_an_address_is_none() {
    let machine = Machine::new("1.0.0");
    machine.program("two", r#"echo '{"cniVersion": "1.0.0"}'"#);
    let error = machine.attach().await.unwrap_err().to_string();
    assert!(
        error.contains("net") && error.contains("no address"),
        "{error}"
    );
    machine.program("two", "");
    let error = machine.attach().await.unwrap_err().to_string();
    assert!(error.contains("the answer of the last plugin"), "{error}");
}

#[tokio::test]
async fn a_network_is_ready_when_it_and_its_plugins_are_there() {
    let machine = Machine::new("1.0.0");
    machine.cni.ready().await.unwrap();
    assert!(machine.calls().is_empty());
    fs::remove_file(machine.directory.path().join("bin/two")).unwrap();
    let error = machine.cni.ready().await.unwrap_err().to_string();
    assert!(error.contains("two"), "{error}");
    fs::remove_file(machine.directory.path().join("net.d/10-net.conflist")).unwrap();
    let error = machine.cni.ready().await.unwrap_err();
    assert!(
        matches!(error, NetworkError::Cni(CniError::NoNetwork(_))),
        "{error}"
    );
}

#[tokio::test]
async fn plugins_of_1_1_are_asked_for_their_status_and_to_collect() {
    let machine = Machine::new("1.1.0");
    machine.attach().await.unwrap();
    machine.calls();
    machine.program("two", r#"echo '{"code": 50, "msg": "no uplink"}'; exit 1"#);
    let error = machine.cni.ready().await.unwrap_err().to_string();
    assert!(error.contains("STATUS: no uplink, code 50"), "{error}");
    assert_eq!(machine.words(), ["STATUS one", "STATUS two"]);
    machine.cni.collect(&["abc".to_owned()]).await;
    let calls = machine.calls();
    assert_eq!([&calls[0].0, &calls[1].0], ["GC one", "GC two"]);
    assert_eq!(
        calls[0].1["cni.dev/valid-attachments"],
        json!([{"containerID": "abc", "ifname": "eth0"}])
    );
}

#[tokio::test]
async fn plugins_are_asked_whether_a_pod_still_has_its_network() {
    let machine = Machine::new("0.4.0");
    machine.attach().await.unwrap();
    machine.calls();
    machine.cni.check("abc").await.unwrap();
    let calls = machine.calls();
    assert_eq!([&calls[0].0, &calls[1].0], ["CHECK one", "CHECK two"]);
    assert_eq!(calls[0].1["prevResult"]["ips"][0]["address"], "10.9.0.2/24");
    assert_eq!(machine.cni.details("abc").await["broken"], Value::Null);

    machine.program("one", r#"echo '{"code": 101, "msg": "no link"}'; exit 1"#);
    machine.cni.check_all(&["abc".to_owned()]).await;
    assert_eq!(machine.words(), ["CHECK one"]);
    let details = machine.cni.details("abc").await;
    let broken = details["broken"].as_str().unwrap();
    assert!(broken.contains("CHECK: no link, code 101"), "{broken}");
    assert_eq!(details["result"]["ips"][0]["address"], "10.9.0.2/24");
}

#[tokio::test]
async fn check_is_left_out_where_the_configuration_or_its_version_has_none() {
    for (version, disabled) in [("0.3.1", false), ("1.0.0", true)] {
        let machine = Machine::new(version);
        let path = machine.directory.path().join("net.d/10-net.conflist");
        let text = fs::read_to_string(&path).unwrap();
        let mut list: Value = serde_json::from_str(&text).unwrap();
        list["disableCheck"] = disabled.into();
        fs::write(&path, list.to_string()).unwrap();
        machine.attach().await.unwrap();
        machine.calls();
        machine.cni.check("abc").await.unwrap();
        assert!(machine.calls().is_empty(), "{version}");
    }
}
