//! The numbers, names and types of the wire, compared with what the specification says.

use std::collections::BTreeMap;

use heartbeatpb::wire;
use prost::Message as _;

#[path = "descriptors/spec.rs"]
mod spec;

/// The part of `google.protobuf.FileDescriptorSet` that the comparison needs.
#[derive(Clone, PartialEq, prost::Message)]
struct FileSet {
    #[prost(message, repeated, tag = "1")]
    files: Vec<File>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct File {
    #[prost(string, tag = "2")]
    package: String,
    #[prost(message, repeated, tag = "4")]
    messages: Vec<Descriptor>,
    #[prost(message, repeated, tag = "5")]
    enums: Vec<Enumeration>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Descriptor {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    fields: Vec<Field>,
    #[prost(message, repeated, tag = "3")]
    nested: Vec<Descriptor>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Field {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int32, tag = "3")]
    number: i32,
    #[prost(int32, tag = "4")]
    label: i32,
    #[prost(int32, tag = "5")]
    kind: i32,
    #[prost(string, tag = "6")]
    type_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Enumeration {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    values: Vec<Value>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Value {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int32, tag = "2")]
    number: i32,
}

fn files() -> Vec<File> {
    FileSet::decode(wire::DESCRIPTORS).expect("generated descriptors").files
}

/// The type as the specification writes it.
fn type_of(package: &str, message: &Descriptor, field: &Field) -> String {
    let scalar = match field.kind {
        2 => "float",
        3 => "int64",
        4 => "uint64",
        5 => "int32",
        8 => "bool",
        9 => "string",
        12 => "bytes",
        13 => "uint32",
        11 | 14 => {
            let name = field.type_name.trim_start_matches('.');
            let entry = message.nested.iter().find(|nested| name.ends_with(&format!(".{}", nested.name)));
            if let Some(entry) = entry {
                let part = |index: usize| type_of(package, entry, &entry.fields[index]);
                return format!("map of {} to {}", part(0), part(1));
            }
            name.strip_prefix(&format!("{package}.")).unwrap_or(name)
        }
        other => panic!("field type {other} is not expected"),
    };
    if field.label == 3 { format!("repeated {scalar}") } else { scalar.to_owned() }
}

#[test]
fn every_field_has_the_number_and_the_type_of_the_specification() {
    let mut found = BTreeMap::new();
    for file in files() {
        for message in &file.messages {
            for field in &message.fields {
                found.insert(
                    (file.package.clone(), message.name.clone(), field.number),
                    (field.name.clone(), type_of(&file.package, message, field)),
                );
            }
        }
    }
    let expected: BTreeMap<_, _> = spec::FIELDS
        .iter()
        .map(|(package, message, number, field, kind)| {
            (
                ((*package).to_owned(), (*message).to_owned(), *number),
                ((*field).to_owned(), (*kind).to_owned()),
            )
        })
        .collect();
    for (key, field) in &expected {
        assert_eq!(found.get(key), Some(field), "{key:?}");
    }
    // Fields of our own in shared messages have numbers that nobody else will take.
    for key in found.keys().filter(|key| !expected.contains_key(*key)) {
        assert!(key.2 >= 1000, "{key:?} is not in the specification");
    }
}

#[test]
fn every_enum_has_the_values_of_the_specification() {
    let mut found = BTreeMap::new();
    for file in files() {
        for enumeration in file.enums {
            let values: Vec<_> = enumeration.values.into_iter().map(|v| (v.name, v.number)).collect();
            found.insert(enumeration.name, values);
        }
    }
    for (name, values) in spec::ENUMS {
        let values: Vec<_> = values.iter().map(|(value, number)| ((*value).to_owned(), *number)).collect();
        assert_eq!(found.remove(*name), Some(values), "{name}");
    }
    assert!(found.is_empty(), "enums outside the specification: {found:?}");
}
