//! `weir conntrack`: the connections of a running router.

use std::{
    io::{self, BufWriter, Write as _},
    process::ExitCode,
};

use weir_node::{
    conntrack::{self, Action, Filter, Query},
    control::AskError,
};

use crate::common::{ConfigFile, Failed, Output};

/// List, count, delete or watch the connections of a running router.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    weir conntrack --dst 10.96.0.10 --dport 80        connections to a service\n  \
    weir conntrack count --state unreplied            how many wait for an answer\n  \
    weir conntrack delete --reply-src 10.1.2.20       forget those to a backend\n  \
    weir conntrack watch --proto udp --output json    what happens, a line for each event\n\
    Lines are as `conntrack -L` prints them: protocol, its number, seconds left, state, both directions.")]
pub struct Args {
    /// What to do with the connections that the filters name.
    #[arg(value_enum, default_value = "list")]
    action: Action,
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    filter: Filter,
    /// With delete, without a filter: all of them.
    #[arg(long)]
    all: bool,
    /// How connections are printed; JSON is a list, or with watch an object per line.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Asks, and prints each connection or event.
///
/// # Errors
/// Where no router answers, or its answer cannot be read or printed.
pub fn run(args: &Args) -> Result<ExitCode, Failed> {
    let action = args.action;
    let out = &mut BufWriter::new(io::stdout().lock());
    if action == Action::Delete && args.filter.is_empty() != args.all {
        return Err("delete needs either filters, or --all to remove every connection".into());
    }
    let query = Query { action, filter: args.filter.clone() };
    let json = args.output == Output::Json;
    let mut shown = 0_u64;
    let result = conntrack::ask(&args.config.config, &query, |value| {
        shown += 1;
        match action {
            Action::List if json => write!(out, "{}{value}", if shown == 1 { "[\n" } else { ",\n" }),
            Action::List => writeln!(out, "{}", conntrack::text_line(value)),
            Action::Count if !json => writeln!(out, "{}", value["count"]),
            Action::Delete if !json => writeln!(out, "{} deleted", value["deleted"]),
            Action::Count | Action::Delete => writeln!(out, "{value}"),
            // Whoever waits for events waits for the line.
            Action::Watch if value["watching"] == true => Ok(()),
            Action::Watch if json => writeln!(out, "{value}").and_then(|()| out.flush()),
            Action::Watch => writeln!(out, "{}", conntrack::text_line(value)).and_then(|()| out.flush()),
        }
    });
    let end = match (action, json, shown) {
        (Action::List, true, 0) => "[]\n",
        (Action::List, true, _) => "\n]\n",
        _ => "",
    };
    let written = result.map_err(|error| match error {
        AskError::Broken(source) if source.kind() == io::ErrorKind::BrokenPipe => None,
        error => Some(error.to_string()),
    });
    match written
        .and_then(|()| write!(out, "{end}").and_then(|()| out.flush()).map_err(|error| Some(error.to_string())))
    {
        // Who reads no more, as `head`, has what they wanted.
        Ok(()) | Err(None) => Ok(ExitCode::SUCCESS),
        Err(Some(message)) => Err(message.into()),
    }
}
