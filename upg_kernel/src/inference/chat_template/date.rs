//! Date that a template can ask for.
#![forbid(unsafe_code)]

use minijinja::{Error, ErrorKind};
use std::time::SystemTime;

const SECONDS_PER_DAY: u64 = 24 * 60 * 60;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// Day of the Gregorian calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    year: u16,
    month: u8,
    day: u8,
}

impl Date {
    /// Returns a date; `None` if the calendar has no such day (years 1 to 9999).
    pub fn new(year: u16, month: u8, day: u8) -> Option<Self> {
        let leap =
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let days = match month {
            2 => 28 + u8::from(leap),
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        ((1..=9999).contains(&year) && (1..=days).contains(&day)).then_some(Self {
            year,
            month,
            day,
        })
    }

    /// Returns the current UTC date; 1970-01-01 if the clock is before that.
    pub fn today() -> Self {
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Self::after_1970(since.as_secs() / SECONDS_PER_DAY)
    }

    /// Returns the date `days` days after 1970-01-01, at most 9999-12-31.
    fn after_1970(days: u64) -> Self {
        let mut left = days;
        for year in 1970..=9999 {
            for month in 1..=12 {
                let length = (28..=31)
                    .rev()
                    .find(|&day| Self::new(year, month, day).is_some());
                let length = length.map_or(0, u64::from);
                if left < length {
                    let day = left as u8 + 1;
                    return Self { year, month, day };
                }
                left -= length;
            }
        }
        let (year, month, day) = (9999, 12, 31);
        Self { year, month, day }
    }

    /// Formats midnight of this day as Python's `strftime` does,
    /// for the codes that templates use.
    pub(super) fn strftime(self, format: &str) -> Result<String, Error> {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let code = chars.next();
            out.push_str(&self.field(code).ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now: unknown code %{}", code.unwrap_or(' ')),
                )
            })?);
        }
        Ok(out)
    }

    fn field(self, code: Option<char>) -> Option<String> {
        let month = MONTHS.get(usize::from(self.month).checked_sub(1)?)?;
        let weekday = DAYS.get(self.weekday())?;
        Some(match code? {
            'Y' => format!("{:04}", self.year),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'B' => (*month).to_owned(),
            'b' | 'h' => month.chars().take(3).collect(),
            'A' => (*weekday).to_owned(),
            'a' => weekday.chars().take(3).collect(),
            'F' => format!("{:04}-{:02}-{:02}", self.year, self.month, self.day),
            'H' | 'M' | 'S' => "00".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }

    /// Returns the weekday, 0 for Sunday (Sakamoto's method).
    fn weekday(self) -> usize {
        const OFFSETS: [usize; 13] = [0, 0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let month = usize::from(self.month);
        let y = usize::from(self.year) - usize::from(month < 3);
        let offset = OFFSETS.get(month).copied().unwrap_or_default();
        (y + y / 4 - y / 100 + y / 400 + offset + usize::from(self.day)) % 7
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_as_python_writes_them() {
        // datetime(2024, 7, 26).strftime(...), datetime(2000, 2, 29), datetime(1999, 12, 31)
        let all = "%d %b %Y|%A, %B %d|%a %y-%m-%d|%H:%M:%S %%";
        for (date, expected) in [
            (
                (2024, 7, 26),
                "26 Jul 2024|Friday, July 26|Fri 24-07-26|00:00:00 %",
            ),
            (
                (2000, 2, 29),
                "29 Feb 2000|Tuesday, February 29|Tue 00-02-29|00:00:00 %",
            ),
            (
                (1999, 12, 31),
                "31 Dec 1999|Friday, December 31|Fri 99-12-31|00:00:00 %",
            ),
        ] {
            let date = Date::new(date.0, date.1, date.2).unwrap();
            assert_eq!(date.strftime(all).unwrap(), expected);
        }
        // datetime(1970, 1, 1) + timedelta(days=n)
        for (days, (year, month, day)) in [
            (0, (1970, 1, 1)),
            (11_016, (2000, 2, 29)),
            (20_781, (2026, 11, 24)),
            (u64::MAX, (9999, 12, 31)),
        ] {
            assert_eq!(Date::after_1970(days), Date { year, month, day });
        }
        assert!(Date::new(1900, 2, 29).is_none());
        assert!(Date::new(2023, 13, 1).is_none());
        assert!(Date::new(2023, 4, 31).is_none());
        let date = Date::new(2023, 4, 30).unwrap();
        assert!(date.strftime("%Q").is_err());
        assert!(date.strftime("%").is_err());
    }
}
