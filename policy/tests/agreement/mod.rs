//! What must hold between a model, the linear evaluator and classifiers, whatever the model.

use std::{net::IpAddr, sync::Arc};

use weir_packet::{Address, FlowKey, Ports};
use weir_policy::{Classifier, Compiler, EndpointId, Judgement, PolicyDirection, RuleId, model::*};

use crate::{
    oracle::{self, Judged, Packet},
    world::edit::Edit,
};

pub fn classify(classifier: &Classifier, endpoint: &str, direction: PolicyDirection, packet: &Packet) -> Judged {
    let endpoint = classifier.endpoint(endpoint).expect("a local workload");
    let ports = Ports::new(packet.source_port, packet.destination_port);
    let protocol = packet.protocol;
    match (packet.source, packet.destination) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            judged(classifier, endpoint, direction, &FlowKey { src, dst, ports, protocol })
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            judged(classifier, endpoint, direction, &FlowKey { src, dst, ports, protocol })
        }
        _ => unreachable!("both ends are of one family"),
    }
}

fn judged<A: Address>(
    classifier: &Classifier,
    endpoint: EndpointId,
    direction: PolicyDirection,
    key: &FlowKey<A>,
) -> Judged {
    let Judgement { allow, rule } = classifier.judge(endpoint, direction, key);
    let logged = classifier.logged(endpoint, direction, key);
    assert!(logged.is_empty() || classifier.has_logs());
    let name = |rule: &RuleId| classifier.rule_name(*rule);
    Judged { allow, by: name(&rule), logged: logged.iter().map(name).collect() }
}

pub fn locals(model: &Model) -> impl Iterator<Item = &Endpoint> {
    let endpoints = model.endpoints.iter().map(|endpoint| &**endpoint);
    endpoints.filter(|endpoint| endpoint.local && endpoint.kind == EndpointKind::Workload)
}

/// That a classifier says what the linear evaluator says of the model.
pub fn agree(classifier: &Classifier, model: &Model, packets: &[Packet]) {
    for endpoint in locals(model) {
        for direction in PolicyDirection::ALL {
            for packet in packets {
                let seen = classify(classifier, &endpoint.name, direction, packet);
                let expected = oracle::judge(model, endpoint, direction, packet);
                assert_eq!(seen, expected, "{} {direction:?} {packet:?}", endpoint.name);
            }
        }
    }
}

/// That a compiler which follows edits says what a fresh one says, and what the rules say, after each of them. An edit
/// may come with all objects made anew, as by somebody who shares nothing.
pub fn follow(mut model: Model, packets: &[Packet], edits: &[(Edit, bool)]) {
    let mut compiler = Compiler::default();
    agree(&compiler.compile(&model).expect("within the limits"), &model, packets);
    for (edit, is_remade) in edits {
        edit.apply(&mut model);
        if *is_remade {
            model.endpoints.iter_mut().for_each(|endpoint| *endpoint = Arc::new((**endpoint).clone()));
            let policies = model.tiers.iter_mut().flat_map(|tier| &mut tier.policies);
            policies.for_each(|policy| *policy = Arc::new((**policy).clone()));
            model.profiles.iter_mut().for_each(|profile| *profile = Arc::new((**profile).clone()));
        }
        let followed = compiler.compile(&model).expect("within the limits");
        let fresh = Classifier::compile(&model).expect("within the limits");
        agree(&followed, &model, packets);
        assert_eq!(followed.program_count(), fresh.program_count());
        assert_eq!(followed.rules().count(), fresh.rules().count());
        assert!(followed.endpoints().eq(fresh.endpoints()));
        for (id, name) in fresh.endpoints() {
            assert_eq!(followed.stamp(id), fresh.stamp(id), "{name}");
        }
    }
}
