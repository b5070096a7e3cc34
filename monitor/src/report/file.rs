//! Reading what `--out` wrote: a Record, or a list of them.

use super::record::{Record, SCHEMA};
use crate::failure::Failure;
use std::path::Path;

/// Reads a file of one Record or of a list.
///
/// # Errors
/// [`Failure::Input`]: the file cannot be read, is no Record, is empty, or is of another schema.
pub fn read(path: &Path) -> Result<Vec<Record>, Failure> {
    let refuse = |why: &dyn std::fmt::Display| Failure::Input(format!("{}: {why}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| refuse(&error))?;
    let value: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| refuse(&format!("not JSON: {error}")))?;
    let values = match value {
        serde_json::Value::Array(values) => values,
        one => vec![one],
    };
    if values.is_empty() {
        return Err(refuse(&"an empty list of Records"));
    }
    let mut records = Vec::with_capacity(values.len());
    for value in values {
        // The schema comes first, since another one may look different everywhere else.
        match value.get("schema").and_then(serde_json::Value::as_u64) {
            Some(schema) if schema == u64::from(SCHEMA) => {}
            Some(other) => return Err(refuse(&format!("a Record of schema {other}, and this umbra reads {SCHEMA}"))),
            None => return Err(refuse(&"not a Record: it has no schema")),
        }
        records.push(serde_json::from_value(value).map_err(|error| refuse(&format!("not a Record: {error}")))?);
    }
    Ok(records)
}

/// The text of a file that holds a list.
///
/// # Panics
/// Never: a Record has only string keys.
#[must_use]
pub fn list(records: &[Record]) -> String {
    let mut text = serde_json::to_string_pretty(records).expect("a Record has only string keys");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_and_many_are_read_and_others_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        let said = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read(&path).map(|records| records.len()).map_err(|failure| {
                assert!(matches!(failure, Failure::Input(_)));
                failure.to_string()
            })
        };
        let record = r#"{"schema":1,"scenario":"x","host":{"ground":"lab","kernel":"k","vendor":"amd","cpu_model":"c","params":{},
            "clock":"instructions","deterministic":true,"umbra":"0","firmware_sha256":"f"},"config":{},"rows":[]}"#;
        assert_eq!(said(record), Ok(1));
        assert_eq!(said(&format!("[{record},{record}]")), Ok(2));
        for (text, part) in [
            ("[]", "empty list"),
            ("{", "not JSON"),
            ("{}", "no schema"),
            (r#"{"schema":7}"#, "schema 7"),
            (r#"{"schema":1}"#, "not a Record: missing field"),
        ] {
            let line = said(text).unwrap_err();
            assert!(line.contains(part) && !line.contains('\n'), "{line}");
        }
        assert!(read(&directory.path().join("none")).is_err());
    }
}
