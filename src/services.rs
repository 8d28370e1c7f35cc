//! `weir services`: the services of a running router, with their backends.

use std::{
    io::{self, BufWriter, Write as _},
    process::ExitCode,
};

use weir_node::services::{self, Query};

use crate::common::{ConfigFile, Failed, Output, written};

/// List the services and backends of a running router: which are used, why not, and how many connections each got.
#[derive(clap::Args)]
pub struct Args {
    /// Only those of a namespace, or one service, or one port of it.
    #[arg(value_name = "NAMESPACE[/NAME[:PORT]]")]
    of: Option<String>,
    #[command(flatten)]
    config: ConfigFile,
    /// How services are printed; JSON is a list.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Asks, and prints each service port with its backends.
///
/// # Errors
/// Where no router answers, or nothing is what is asked for.
pub fn run(args: Args) -> Result<ExitCode, Failed> {
    let out = &mut BufWriter::new(io::stdout().lock());
    let query = Query { of: args.of };
    let mut all = Vec::new();
    services::ask(&args.config.config, &query, |service| {
        all.push(service.clone());
        Ok(())
    })?;
    if let (Some(of), true) = (&query.of, all.is_empty()) {
        let expected = "expected NAMESPACE, NAMESPACE/NAME or NAMESPACE/NAME:PORT";
        return Err(format!("no service that is served is {of}; {expected}").into());
    }
    let printed = match args.output {
        Output::Json => writeln!(out, "{:#}", serde_json::Value::from(all)),
        Output::Text => all.iter().try_for_each(|service| write!(out, "{}", services::text(service))),
    };
    written(printed.and_then(|()| out.flush()))?;
    Ok(ExitCode::SUCCESS)
}
