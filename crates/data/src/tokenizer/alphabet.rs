//! GPT-2's alphabet: a printable character for each of the 256 bytes, so that a vocabulary of bytes is text.
//! (`bytes_to_unicode` of GPT-2's `encoder.py`.)

use std::sync::LazyLock;

/// Character of each byte.
static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut chars = ['\0'; 256];
    let mut shifted = 256;
    for byte in 0..=255u8 {
        let code = if printable(byte) {
            u32::from(byte)
        } else {
            shifted += 1;
            shifted - 1
        };
        chars[byte as usize] = char::from_u32(code).unwrap_or('\0');
    }
    chars
});

/// Byte of each character of the alphabet; all of them are below this many.
static BYTES: LazyLock<[Option<u8>; 512]> = LazyLock::new(|| {
    let mut bytes = [None; 512];
    for (byte, c) in CHARS.iter().enumerate() {
        bytes[*c as usize] = Some(byte as u8);
    }
    bytes
});

/// The character of a byte.
pub(crate) fn char_of(byte: u8) -> char {
    CHARS[byte as usize]
}

/// Bytes as characters of the alphabet.
pub(crate) fn to_chars(bytes: &[u8]) -> String {
    bytes.iter().map(|&b| char_of(b)).collect()
}

/// Characters of the alphabet as bytes; `None` when one is not of it.
pub(crate) fn to_bytes(text: &str) -> Option<Vec<u8>> {
    text.chars().map(|c| BYTES.get(c as usize).copied().flatten()).collect()
}

/// The byte of a byte-fallback token such as `<0xE9>`.
pub(crate) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The name of a byte-fallback token.
pub(crate) fn fallback_token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn is_the_alphabet_of_the_library() {
        let theirs = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert_eq!(CHARS.iter().copied().collect::<std::collections::HashSet<_>>(), theirs.into_iter().collect());
        assert_eq!(to_chars(b" \n\x00\xffa"), "ĠĊĀÿa");
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(to_bytes(&to_chars(&all)).unwrap(), all);
        assert_eq!(to_bytes("中"), None);
    }
}
