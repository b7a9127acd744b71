//! Protobuf's wire format: fields, each a key and a number or bytes (<https://protobuf.dev/programming-guides/encoding/>).

/// A message under construction.
#[derive(Debug, Clone, Default)]
pub struct Message(Vec<u8>);

impl Message {
    /// A number; negative ones take ten bytes.
    pub fn int(&mut self, field: u32, value: i64) -> &mut Self {
        self.varint(u64::from(field) << 3);
        self.varint(value as u64);
        self
    }

    /// A float.
    pub fn float(&mut self, field: u32, value: f32) -> &mut Self {
        self.varint(u64::from(field) << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// A text, bytes, or a message.
    pub fn bytes(&mut self, field: u32, value: impl AsRef<[u8]>) -> &mut Self {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(value.as_ref().len() as u64);
        self.0.extend(value.as_ref());
        self
    }

    /// A message that `fill` fills.
    pub fn message(&mut self, field: u32, fill: impl FnOnce(&mut Message)) -> &mut Self {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(field, inner)
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

impl AsRef<[u8]> for Message {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_documentation() {
        // "encoding/": Test1 { a: 150 }, Test2 { b: "testing" }, Test3 { c: Test1 }.
        let mut first = Message::default();
        first.int(1, 150);
        assert_eq!(first.as_ref(), [0x08, 0x96, 0x01]);
        let mut second = Message::default();
        second.bytes(2, "testing");
        assert_eq!(second.as_ref(), [0x12, 0x07, 0x74, 0x65, 0x73, 0x74, 0x69, 0x6e, 0x67]);
        let mut third = Message::default();
        third.message(3, |inner| {
            inner.int(1, 150);
        });
        assert_eq!(third.as_ref(), [0x1a, 0x03, 0x08, 0x96, 0x01]);
        let mut negative = Message::default();
        negative.int(1, -2);
        assert_eq!(negative.as_ref(), [8, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]);
    }
}
