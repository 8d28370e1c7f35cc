//! What goes wrong is said, and nothing is broken by it.

use std::process::Output;

use crate::{
    manifests::Manifests,
    site::{DEADLINE, NodePlan, Site, weir_binary},
};

fn site(cores: &[usize]) -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20"]);
    Site::build(&[NodePlan::new("node-a", &["192.168.10.1/24"], cores)], &manifests.text(), "")
}

fn weir(site: &Site, before: &[&str], command: &str) -> (Output, String) {
    let (binary, config) = (weir_binary().display().to_string(), site.config("node-a").display().to_string());
    let mut arguments = before.to_vec();
    arguments.extend([binary.as_str(), command, "-c", &config]);
    let output = site.lab.output_in("node-a", &arguments).unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output, said)
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn without_root_it_says_so() {
    let site = site(&[0]);
    let (output, said) = weir(&site, &["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"], "run");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("root"), "{said}");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn too_few_queues_name_the_command_that_helps() {
    let mut site = site(&[0]);
    let text = std::fs::read_to_string(site.config("node-a")).unwrap().replace("cores: [0]", "cores: [0, 1]");
    site.write("node-a.yaml", &text);
    let (output, said) = weir(&site, &[], "run");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("eth0 has 1 receive queues for 2 workers") && said.contains("ethtool -L eth0"), "{said}");
    site.write("node-a.yaml", &text.replace("cores: [0, 1]", "cores: [0]"));
    site.start_all();
    site.pings("default/client", "-c 1 10.1.1.20");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_core_or_an_uplink_that_does_not_exist_is_named() {
    let site = site(&[0]);
    let good = std::fs::read_to_string(site.config("node-a")).unwrap();
    for (from, to, expected) in [
        ("cores: [0]", "cores: [4095]", "core 4095"),
        ("name: eth0", "name: eth7", "the uplink eth7"),
        ("nodeName", "nodename", "nodeName"),
    ] {
        site.write("node-a.yaml", &good.replace(from, to));
        let (output, said) = weir(&site, &[], "run");
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(expected), "{expected} is missing in: {said}");
    }
    let links = site.lab.run_in("node-a", &["ip", "link"]).unwrap();
    assert!(!links.contains("weir0@"), "a router that does not start attaches nothing:\n{links}");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_second_router_is_refused_and_the_first_goes_on() {
    let mut site = site(&[0]);
    site.start_all();
    let (output, said) = weir(&site, &[], "run");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("stop it first"), "{said}");
    site.pings("default/client", "-c 2 10.1.1.20");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_bad_reload_keeps_the_last_good_configuration() {
    let mut site = site(&[0]);
    site.serve("default/server", &[80]);
    let deny = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: default, name: closed}, \
                spec: {podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress]}}\n";
    site.write("policies.yaml", deny);
    site.start_all();
    let url = "http://10.1.1.20/";
    site.unanswered("default/client", url);
    let good = std::fs::read_to_string(site.config("node-a")).unwrap();
    // What cannot be read loses nothing; weir.yaml is refused whole.
    for (file, text, outcome, reason, in_force) in [
        ("policies.yaml", "{ broken".to_owned(), "objects are faulty", "policies.yaml:1", true),
        ("node-a.yaml", good.replace("workers:", "wrokers:"), "reload refused", "wrokers", false),
    ] {
        let before = std::fs::read_to_string(site.lab.folder().join(file)).unwrap();
        let outcomes = site.router("node-a").log().matches(outcome).count();
        site.write(file, &text);
        weir_lab::wait_until("the outcome", DEADLINE, || {
            let log = site.router("node-a").log();
            (log.matches(outcome).count() > outcomes && log.contains(reason)).then_some(())
        })
        .unwrap();
        let configuration = site.status("node-a")["configuration"].clone();
        assert_eq!(configuration["newestInForce"], in_force, "{configuration}");
        assert!(in_force || configuration["problems"][0].as_str().unwrap().contains(reason), "{configuration}");
        site.unanswered("default/client", url);
        // Back to what it was, which is taken over again.
        let reloads = site.router("node-a").log().matches("reloaded").count();
        site.write(file, &before);
        weir_lab::wait_until("the reload", DEADLINE, || {
            (site.router("node-a").log().matches("reloaded").count() > reloads).then_some(())
        })
        .unwrap();
        assert_eq!(site.status("node-a")["configuration"]["newestInForce"], true);
    }
    site.set_policies("");
    site.answered("default/client", url);
    site.finish();
}
