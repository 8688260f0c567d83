//! Sizes in bytes, as people write them.

/// Reads `512M`, `1G`, `1GiB` or a plain number of bytes; K, M, G and T are powers of 1024.
///
/// # Errors
/// What is wrong, as a clause.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = match number.parse() {
        Ok(number) => number,
        Err(_) if number.is_empty() => return Err("not a size; write it as 512M or 1G".to_owned()),
        Err(_) => return Err("too large a number".to_owned()),
    };
    let shift = match unit {
        "" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        "T" | "t" | "TiB" => 40,
        _ => return Err("not a size; write it as 512M or 1G".to_owned()),
    };
    number.checked_mul(1 << shift).ok_or_else(|| "too large a number".to_owned())
}

/// Writes a size in the largest unit that leaves a whole number; reads back by [`parse`].
pub fn text(bytes: u64) -> String {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Writes a size for people, with at most one decimal.
pub fn rounded(bytes: u64) -> String {
    let tenths = bytes / (1 << 20) * 10 / 1024;
    match tenths {
        0..10 => format!("{} MiB", bytes >> 20),
        _ => format!("{}.{} GiB", tenths / 10, tenths % 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written_back() {
        for (text, bytes) in [("512M", 512 << 20), ("1G", 1 << 30), ("1GiB", 1 << 30), ("4096", 4096), ("2T", 2 << 40)]
        {
            assert_eq!(parse(text), Ok(bytes));
            assert_eq!(parse(&super::text(bytes)), Ok(bytes));
        }
        assert_eq!(rounded(25_275_932_672), "23.5 GiB");
        assert_eq!(rounded(700 << 20), "700 MiB");
        for wrong in ["", "M", "-1", "1.5G", "1GB", "1 G", "99999999999999999999", "99999999T", "0x10"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
