//! Numbers that carry their unit, in the forms of the wire contract.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Mebibytes of memory or disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Hash)]
pub struct Mib(pub u32);

/// Thousandths of a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MilliCpu(pub u32);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUnit {
    #[error("{0:?} is not a size such as 512Mi, 2Gi or 2048Mi")]
    Size(String),
    #[error("{0:?} is not an amount of CPU such as 250m, 1000m or 0.5")]
    Cpu(String),
}

impl Mib {
    pub const fn bytes(self) -> u64 {
        self.0 as u64 * 1024 * 1024
    }
}

impl FromStr for Mib {
    type Err = BadUnit;

    /// `512Mi`, `2Gi`, `20Gi`. A bare number is refused: its unit would be a guess.
    fn from_str(s: &str) -> Result<Self, BadUnit> {
        let bad = || BadUnit::Size(s.chars().take(40).collect());
        let (digits, factor) = match (s.strip_suffix("Mi"), s.strip_suffix("Gi")) {
            (Some(digits), _) => (digits, 1),
            (_, Some(digits)) => (digits, 1024),
            _ => return Err(bad()),
        };
        let number: u32 = digits.parse().map_err(|_| bad())?;
        number.checked_mul(factor).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}Mi", self.0)
    }
}

impl FromStr for MilliCpu {
    type Err = BadUnit;

    /// `250m`, or CPUs with up to three decimals: `0.25`, `2`.
    fn from_str(s: &str) -> Result<Self, BadUnit> {
        let bad = || BadUnit::Cpu(s.chars().take(40).collect());
        if let Some(digits) = s.strip_suffix('m') {
            return digits.parse().map(Self).map_err(|_| bad());
        }
        let (whole, fraction) = s.split_once('.').unwrap_or((s, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(fraction) || fraction.len() > 3 {
            return Err(bad());
        }
        let whole: u32 = whole.parse().map_err(|_| bad())?;
        let fraction: u32 = format!("{fraction:0<3}").parse().map_err(|_| bad())?;
        whole
            .checked_mul(1000)
            .and_then(|milli| milli.checked_add(fraction))
            .map(Self)
            .ok_or_else(bad)
    }
}

impl fmt::Display for MilliCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}m", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_mebibytes() {
        assert_eq!("2048Mi".parse(), Ok(Mib(2048)));
        assert_eq!("20Gi".parse(), Ok(Mib(20_480)));
        for text in ["", "2", "2G", "-1Mi", "4194304Gi", "2.5Gi", "Mi"] {
            assert!(text.parse::<Mib>().is_err(), "{text}");
        }
    }

    #[test]
    fn cpus_are_read_in_thousandths() {
        assert_eq!("250m".parse(), Ok(MilliCpu(250)));
        assert_eq!("0.25".parse(), Ok(MilliCpu(250)));
        assert_eq!("2".parse(), Ok(MilliCpu(2000)));
        for text in ["", "m", "-1", "1.2345", ".5", "1.", "4294968"] {
            assert!(text.parse::<MilliCpu>().is_err(), "{text}");
        }
    }
}
