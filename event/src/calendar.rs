//! The proleptic Gregorian calendar: dates as numbers of days, and back.

/// Days from 1970-01-01 to 2000-01-01, from which PostgreSQL counts.
pub const DAYS_TO_2000: i64 = 10_957;

/// Days from 0000-03-01 to 1970-01-01.
const DAYS_TO_1970: i64 = 719_468;
/// Days of 400 years, after which the calendar repeats itself.
const ERA: i64 = 146_097;

/// Days since 1970-01-01 of a date; year 0 is 1 BC, year -1 is 2 BC, …. Months are 1 to 12; a day beyond its month counts
/// into the next one. Years must be within ±20 million million.
#[must_use]
pub fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March, so that a leap day is the last.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * ERA + of_era * 365 + of_era / 4 - of_era / 100 + of_year - DAYS_TO_1970
}

/// Year, month and day of a number of days since 1970-01-01: the inverse of [`days_from_civil`].
#[must_use]
pub fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + DAYS_TO_1970;
    let era = days.div_euclid(ERA);
    let of_era = days.rem_euclid(ERA);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_days_are_where_everybody_has_them() {
        for (date, days) in [
            ((1970, 1, 1), 0),
            ((2000, 1, 1), DAYS_TO_2000),
            ((2000, 2, 29), 11_016),
            ((1969, 12, 31), -1),
            ((0, 3, 1), -DAYS_TO_1970),
            ((1, 1, 1), -719_162),
        ] {
            assert_eq!(days_from_civil(date.0, date.1, date.2), days, "{date:?}");
            assert_eq!(civil_from_days(days), date);
        }
    }

    #[test]
    fn every_day_of_two_eras_comes_back() {
        for days in -ERA..=ERA {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
    }
}
