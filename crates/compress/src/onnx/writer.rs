//! A graph as it is made.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use super::proto::Message;
use super::{Attribute, Dim, Element, OnnxError};

/// The version of the format: that of ONNX 1.12, which came with the operators of set 17. ONNX Runtime reads both since 1.12.
const IR_VERSION: i64 = 8;
const OPSET: i64 = 17;
/// Weights smaller than this are in the graph.
const INSIDE: usize = 1024;
/// Larger ones begin at a multiple of a page, so that they can be mapped.
const PAGE: u64 = 4096;

const MODEL: &str = "model.onnx";
/// Where Optimum has it, too.
const DATA: &str = "model.onnx_data";

// Fields of the messages, by their numbers in onnx.proto.
mod model {
    pub const IR_VERSION: u32 = 1;
    pub const PRODUCER: u32 = 2;
    pub const GRAPH: u32 = 7;
    pub const OPSET: u32 = 8;
    pub const OPSET_VERSION: u32 = 2;
}
mod graph {
    pub const NODE: u32 = 1;
    pub const NAME: u32 = 2;
    pub const INITIALIZER: u32 = 5;
    pub const INPUT: u32 = 11;
    pub const OUTPUT: u32 = 12;
}
mod node {
    pub const INPUT: u32 = 1;
    pub const OUTPUT: u32 = 2;
    pub const NAME: u32 = 3;
    pub const OPERATOR: u32 = 4;
    pub const ATTRIBUTE: u32 = 5;
}
mod attribute {
    pub const NAME: u32 = 1;
    pub const FLOAT: u32 = 2;
    pub const INT: u32 = 3;
    pub const INTS: u32 = 8;
    pub const TYPE: u32 = 20;
}
mod tensor {
    pub const DIMS: u32 = 1;
    pub const TYPE: u32 = 2;
    pub const NAME: u32 = 8;
    pub const RAW: u32 = 9;
    pub const EXTERNAL: u32 = 13;
    pub const LOCATION: u32 = 14;
}
mod value {
    pub const NAME: u32 = 1;
    pub const TYPE: u32 = 2;
    pub const TENSOR: u32 = 1;
    pub const ELEMENT: u32 = 1;
    pub const SHAPE: u32 = 2;
    pub const DIM: u32 = 1;
    pub const FIXED: u32 = 1;
    pub const NAMED: u32 = 2;
}

/// Writes `model.onnx` and `model.onnx_data`.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    data: BufWriter<File>,
    /// Bytes in it.
    at: u64,
    name: String,
    nodes: Message,
    initializers: Message,
    inputs: Message,
    outputs: Message,
    /// Nodes so far.
    count: usize,
    constants: HashSet<String>,
}

impl Writer {
    /// Begins a model in the folder `dir`. The files there are whole after [`finish`](Self::finish).
    ///
    /// # Errors
    /// [`OnnxError::Io`].
    pub fn create(dir: impl Into<PathBuf>, name: &str) -> Result<Self, OnnxError> {
        let dir = dir.into();
        let path = dir.join(DATA);
        let data = BufWriter::new(File::create(&path).map_err(io("create", &path))?);
        Ok(Self {
            dir,
            data,
            at: 0,
            name: name.to_owned(),
            nodes: Message::default(),
            initializers: Message::default(),
            inputs: Message::default(),
            outputs: Message::default(),
            count: 0,
            constants: HashSet::new(),
        })
    }

    /// An input of the model.
    pub fn input(&mut self, name: &str, element: Element, dims: &[Dim<'_>]) {
        self.inputs.message(graph::INPUT, |message| value_info(message, name, element, dims));
    }

    /// An output of the model: `value` under this name.
    pub fn output(&mut self, name: &str, value: &str, element: Element, dims: &[Dim<'_>]) {
        self.add("Identity", &[value], &[name], &[]);
        self.outputs.message(graph::OUTPUT, |message| value_info(message, name, element, dims));
    }

    /// A node with one output, whose name is returned.
    pub fn node(&mut self, operator: &str, inputs: &[&str], attributes: &[(&str, Attribute<'_>)]) -> String {
        let output = format!("v{}", self.count);
        self.add(operator, inputs, &[&output], attributes);
        output
    }

    /// A node with `N` outputs.
    pub fn split<const N: usize>(
        &mut self,
        operator: &str,
        inputs: &[&str],
        attributes: &[(&str, Attribute<'_>)],
    ) -> [String; N] {
        let outputs: [String; N] = std::array::from_fn(|i| format!("v{}_{i}", self.count));
        self.add(operator, inputs, &outputs.each_ref().map(String::as_str), attributes);
        outputs
    }

    fn add(&mut self, operator: &str, inputs: &[&str], outputs: &[&str], attributes: &[(&str, Attribute<'_>)]) {
        let name = format!("{operator}_{}", self.count);
        self.count += 1;
        self.nodes.message(graph::NODE, |message| {
            inputs.iter().for_each(|input| {
                message.bytes(node::INPUT, input);
            });
            outputs.iter().for_each(|output| {
                message.bytes(node::OUTPUT, output);
            });
            message.bytes(node::NAME, name).bytes(node::OPERATOR, operator);
            for (name, value) in attributes {
                message.message(node::ATTRIBUTE, |message| write_attribute(message, name, *value));
            }
        });
    }

    /// Integers of the graph itself, as a tensor of one dimension, or a single one as a number.
    pub fn ints(&mut self, values: &[i64], scalar: bool) -> String {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let text: Vec<String> = values.iter().map(i64::to_string).collect();
        let name = format!("{}{}", if scalar { "int_" } else { "ints_" }, text.join("_"));
        let dims = [values.len()];
        self.constant(name, Element::I64, if scalar { &[] } else { &dims }, &bytes)
    }

    /// A float of the graph itself.
    pub fn float(&mut self, value: f32) -> String {
        self.constant(format!("float_{value:e}"), Element::F32, &[], &value.to_le_bytes())
    }

    fn constant(&mut self, name: String, element: Element, dims: &[usize], bytes: &[u8]) -> String {
        if self.constants.insert(name.clone()) {
            self.inside(&name, element, dims, bytes);
        }
        name
    }

    /// A weight, row-major and little-endian.
    ///
    /// # Errors
    /// [`OnnxError`]: bytes that are not those of its shape, the disk.
    pub fn weight(&mut self, name: &str, element: Element, dims: &[usize], bytes: &[u8]) -> Result<(), OnnxError> {
        let expected = dims.iter().product::<usize>() * element.bytes();
        if bytes.len() != expected {
            return Err(OnnxError::Bytes { name: name.to_owned(), expected, got: bytes.len() });
        }
        if bytes.len() < INSIDE {
            self.inside(name, element, dims, bytes);
            return Ok(());
        }
        let offset = self.at.next_multiple_of(PAGE);
        let path = self.dir.join(DATA);
        let written = self.data.write_all(&vec![0; (offset - self.at) as usize]);
        written.and_then(|()| self.data.write_all(bytes)).map_err(io("write", &path))?;
        self.at = offset + bytes.len() as u64;
        self.initializers.message(graph::INITIALIZER, |message| {
            head(message, name, element, dims);
            for (key, value) in
                [("location", DATA.to_owned()), ("offset", offset.to_string()), ("length", bytes.len().to_string())]
            {
                message.message(tensor::EXTERNAL, |entry| {
                    entry.bytes(1, key).bytes(2, value);
                });
            }
            message.int(tensor::LOCATION, 1);
        });
        Ok(())
    }

    fn inside(&mut self, name: &str, element: Element, dims: &[usize], bytes: &[u8]) {
        self.initializers.message(graph::INITIALIZER, |message| {
            head(message, name, element, dims);
            message.bytes(tensor::RAW, bytes);
        });
    }

    /// Writes the graph and flushes both files.
    ///
    /// # Errors
    /// [`OnnxError::Io`].
    pub fn finish(self) -> Result<(), OnnxError> {
        let data = self.dir.join(DATA);
        let file = self.data.into_inner().map_err(|error| io("write", &data)(error.into_error()))?;
        file.sync_all().map_err(io("flush", &data))?;
        let mut whole = Message::default();
        whole.int(model::IR_VERSION, IR_VERSION).bytes(model::PRODUCER, "firebox");
        // Fields of one kind follow one another; each part has them with their keys.
        let mut graph = self.nodes.as_ref().to_vec();
        let mut name = Message::default();
        name.bytes(graph::NAME, self.name);
        for part in [&name, &self.initializers, &self.inputs, &self.outputs] {
            graph.extend(part.as_ref());
        }
        whole.bytes(model::GRAPH, graph);
        whole.message(model::OPSET, |opset| {
            opset.bytes(1, "").int(model::OPSET_VERSION, OPSET);
        });
        let path = self.dir.join(MODEL);
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(whole.as_ref())?;
            file.sync_all()
        };
        write().map_err(io("write", &path))
    }
}

fn write_attribute(message: &mut Message, name: &str, value: Attribute<'_>) {
    // AttributeProto.AttributeType
    let (float, int, ints) = (1, 2, 7);
    message.bytes(attribute::NAME, name);
    match value {
        Attribute::Float(value) => message.float(attribute::FLOAT, value).int(attribute::TYPE, float),
        Attribute::Int(value) => message.int(attribute::INT, value).int(attribute::TYPE, int),
        Attribute::Ints(values) => {
            values.iter().for_each(|value| {
                message.int(attribute::INTS, *value);
            });
            message.int(attribute::TYPE, ints)
        }
    };
}

/// Shape, type and name of a tensor.
fn head(message: &mut Message, name: &str, element: Element, dims: &[usize]) {
    dims.iter().for_each(|dim| {
        message.int(tensor::DIMS, *dim as i64);
    });
    message.int(tensor::TYPE, element as i64).bytes(tensor::NAME, name);
}

fn value_info(message: &mut Message, name: &str, element: Element, dims: &[Dim<'_>]) {
    message.bytes(value::NAME, name).message(value::TYPE, |message| {
        message.message(value::TENSOR, |message| {
            message.int(value::ELEMENT, element as i64).message(value::SHAPE, |shape| {
                for dim in dims {
                    shape.message(value::DIM, |message| {
                        match dim {
                            Dim::Fixed(n) => message.int(value::FIXED, *n as i64),
                            Dim::Named(name) => message.bytes(value::NAMED, name),
                        };
                    });
                }
            });
        });
    });
}

fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> OnnxError {
    let path = path.to_path_buf();
    move |source| OnnxError::Io { operation, path, source }
}
