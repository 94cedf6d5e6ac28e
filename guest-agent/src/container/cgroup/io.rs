//! Disk input and output: io.weight, io.max.

use super::Setting;
use crate::container::spec::BlockIo;

pub(super) fn settings(block: &BlockIo) -> Vec<Setting> {
    let mut all = Vec::new();
    if let Some(weight) = block.weight.filter(|weight| *weight > 0) {
        // From 10..1000 of v1 to 1..10000 of v2, in a straight line. Without a scheduler that
        // weighs there is no such file, and nothing to share.
        let weight = 1 + (u32::from(weight.clamp(10, 1000)) - 10) * 9_999 / 990;
        all.push(Setting {
            optional: true,
            ..Setting::new("io.weight", weight)
        });
    }
    let rates = [
        ("rbps", &block.throttle_read_bps_device),
        ("wbps", &block.throttle_write_bps_device),
        ("riops", &block.throttle_read_iops_device),
        ("wiops", &block.throttle_write_iops_device),
    ];
    for (key, throttles) in rates {
        for throttle in throttles {
            let (major, minor, rate) = (throttle.major, throttle.minor, throttle.rate);
            all.push(Setting::new(
                "io.max",
                format!("{major}:{minor} {key}={rate}"),
            ));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rate_is_a_line_of_io_max() {
        let block: BlockIo = serde_json::from_str(
            r#"{"weight":1000,"throttleWriteIOPSDevice":[{"major":254,"minor":0,"rate":9}]}"#,
        )
        .unwrap();
        let values: Vec<String> = settings(&block)
            .into_iter()
            .map(|setting| setting.value)
            .collect();
        assert_eq!(values, ["10000", "254:0 wiops=9"]);
    }
}
