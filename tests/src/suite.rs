//! A suite: cases one after the other on one node.

use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::{Result, anyhow};
use libtest_mimic::{Arguments, ColorSetting, Failed, Trial};

use crate::leak::Machine;
use crate::{Node, stall};

/// One behaviour.
pub type Case = fn(&Node) -> Result<()>;

/// Cases which are not run against the reference, with the reason of each.
const NOT_IN_REFERENCE: &str = include_str!("../reference.txt");

/// Lists a suite's cases and makes its `main`.
#[macro_export]
macro_rules! suite {
    ($($case:ident),* $(,)?) => {
        fn main() -> std::process::ExitCode {
            $crate::suite::run(
                env!("CARGO_CRATE_NAME"),
                &[$((stringify!($case), $case as $crate::suite::Case)),*],
            )
        }
    };
}

/// Runs the cases named by the process arguments and then checks that nothing is left.
pub fn run(suite: &str, cases: &[(&'static str, Case)]) -> ExitCode {
    let absent = match absent_from_reference(suite, cases) {
        Ok(absent) => absent,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let reference = crate::node::is_reference();
    let mut arguments = Arguments::from_args();
    // Leaks are found by comparing the machine before and after a case.
    arguments.test_threads = Some(1);
    // The output is read by programs, wherever it goes.
    arguments.color = Some(ColorSetting::Never);

    let node: Arc<OnceLock<Result<Node, String>>> = Arc::default();
    let trials = cases
        .iter()
        .map(|&(name, case)| {
            let node = Arc::clone(&node);
            let suite = suite.to_owned();
            Trial::test(name, move || run_twice_at_most(&suite, &node, name, case))
                .with_ignored_flag(reference && absent.contains(&name))
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);

    let mut left = Ok(());
    if let Some(Ok(node)) = Arc::try_unwrap(node).ok().and_then(OnceLock::into_inner) {
        left = node.close();
    }
    match left {
        Ok(()) => conclusion.exit_code(),
        Err(error) => {
            eprintln!("{suite}: at the end of the suite: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Set where the machine is emulated.
const AGAIN: &str = "BULKHEAD_TEST_AGAIN";

/// Runs a case; in the bed once more if it fails, since its emulator loses an interrupt, or a guest,
/// now and then. A case that is run again is named, with the reason.
fn run_twice_at_most(
    suite: &str,
    node: &OnceLock<Result<Node, String>>,
    name: &str,
    case: Case,
) -> Result<(), Failed> {
    let first = run_case(suite, node, name, case);
    let (Err(failed), Some(_)) = (&first, std::env::var_os(AGAIN)) else {
        return first;
    };
    let why = failed.message().unwrap_or("no reason");
    eprintln!("FAILED ONCE, and is run again: {suite}::{name}\n{why}");
    run_case(suite, node, name, case)
}

fn run_case(
    suite: &str,
    node: &OnceLock<Result<Node, String>>,
    name: &str,
    case: Case,
) -> Result<(), Failed> {
    let node = node
        .get_or_init(|| Node::open(suite).map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| Failed::from(error.as_str()))?;
    // The shared server comes up outside the comparison: it outlives the case.
    let server = node
        .server()
        .map_err(|error| Failed::from(format!("{error:#}")))?;
    let log = server.log_length();
    let failed = |error: anyhow::Error| {
        node.spoil();
        let log = server.log_since(log);
        Failed::from(format!(
            "{suite}::{name}: {error:?}\n--- server's log:\n{log}"
        ))
    };
    let before = Machine::look(node).map_err(failed)?;
    let result =
        case(node).map_err(|error| anyhow!("{error:?}\n--- VMMs then:\n{}", stall::threads()));
    let left = node.clean().and_then(|()| before.settles_again(node));
    result.map_err(failed)?;
    left.map_err(failed)
}

/// The listed names of this suite; one that names no case is an error, so the list stays true.
fn absent_from_reference(suite: &str, cases: &[(&'static str, Case)]) -> Result<Vec<&'static str>> {
    let mut absent = Vec::new();
    for line in NOT_IN_REFERENCE.lines() {
        let entry = line.split_whitespace().next().unwrap_or("#");
        if entry.starts_with('#') {
            continue;
        }
        let entry_of = entry.split_once("::");
        let (of, name) = entry_of.ok_or_else(|| anyhow!("reference.txt has the line {line:?}"))?;
        if of != suite {
            continue;
        }
        let case = cases.iter().find(|(case, _)| *case == name);
        let (case, _) = case.ok_or_else(|| anyhow!("reference.txt names {entry}, no such case"))?;
        absent.push(*case);
    }
    Ok(absent)
}
