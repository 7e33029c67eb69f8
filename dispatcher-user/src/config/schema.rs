//! The JSON Schema of the file, made of the types that read it.

use std::ops::RangeInclusive;

use schemars::{Schema, generate::SchemaSettings};
use serde_json::{Value, json};

use super::{Config, raw, written};

/// The JSON Schema of the configuration file. What it accepts may still be refused, where values must fit
/// together; what it refuses is always refused.
#[must_use]
pub fn schema() -> Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    let mut schema = generator.into_root_schema_for::<raw::File>().to_value();
    forbid_null(&mut schema);
    add_defaults(&mut schema);
    schema
}

/// TOML has no null: what is optional is left out.
fn forbid_null(schema: &mut Value) {
    if let Some(kind) = schema.get_mut("type")
        && let Some([one, null]) = kind.as_array_mut().map(Vec::as_mut_slice)
        && *null == "null"
    {
        *kind = one.take();
    }
    if let Some(forms) = schema.get_mut("anyOf").and_then(Value::as_array_mut) {
        forms.retain(|one| one["type"] != "null");
        if let [one] = forms.as_mut_slice()
            && let Value::Object(one) = one.take()
            && let Some(whole) = schema.as_object_mut()
        {
            whole.remove("anyOf");
            for (key, value) in one {
                whole.entry(key).or_insert(value);
            }
        }
    }
    match schema {
        Value::Object(table) => table.values_mut().for_each(forbid_null),
        Value::Array(list) => list.iter_mut().for_each(forbid_null),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// What stands in a file that says as little as can be.
fn add_defaults(schema: &mut Value) {
    let least = "interfaces = [\"eth0\"]\n[[service]]\nname = \"a\"\nvip = \"192.0.2.1:443\"\n\
                 [[service.backend]]\nname = \"a\"\naddress = \"192.0.2.2:443\"\n[service.health]\ncheck = \"http\"\n";
    let Ok(least) = Config::parse(least, &[]) else { return };
    let Ok(all) = serde_json::to_value(written(&least)) else { return };
    for (place, values) in [
        ("", &all),
        ("/$defs/Interface", &all["interface"][0]),
        ("/$defs/Capacity", &all["capacity"]),
        ("/$defs/Class", &all["class"][0]),
        ("/$defs/Service", &all["service"][0]),
        ("/$defs/Tickets", &all["service"][0]["tickets"]),
        ("/$defs/Health", &all["service"][0]["health"]),
        ("/$defs/Backend", &all["service"][0]["backend"][0]),
    ] {
        let Some(of) = schema.pointer_mut(place) else { continue };
        let required = of["required"].clone();
        let required = |key: &str| required.as_array().is_some_and(|all| all.contains(&json!(key)));
        let Some(properties) = of["properties"].as_object_mut() else { continue };
        for (key, property) in properties {
            let value = &values[key];
            let tables = value.as_array().is_some_and(|list| list.iter().any(Value::is_object));
            if !(value.is_null() || value.is_object() || tables || required(key)) {
                property["default"] = value.clone();
            }
        }
    }
}

/// A word of a list.
pub(super) fn one_of<T>(choices: &[(&'static str, T)]) -> impl FnMut(&mut Schema) {
    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
    move |schema| drop(schema.insert("enum".to_owned(), json!(names)))
}

/// A number of a range.
pub(super) fn within(range: RangeInclusive<i64>) -> impl FnMut(&mut Schema) {
    move |schema| {
        schema.remove("format");
        schema.insert("minimum".to_owned(), json!(range.start()));
        schema.insert("maximum".to_owned(), json!(range.end()));
    }
}

/// "1h30m" and the like.
pub(super) fn duration(schema: &mut Schema) {
    schema.insert("pattern".to_owned(), json!("^([0-9]+[smhd])+$"));
}

/// A name of a service or backend.
pub(super) fn name(schema: &mut Schema) {
    schema.insert("pattern".to_owned(), json!("^[A-Za-z0-9._-]{1,63}$"));
}

/// Bytes, or a list of such.
pub(super) fn hexadecimal(schema: &mut Schema) {
    // Of a list it says nothing.
    schema.insert("pattern".to_owned(), json!("^([0-9a-fA-F]{2})+$"));
}
