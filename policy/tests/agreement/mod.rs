//! What must hold between a model, the linear evaluator and classifiers, whatever the model.

use std::{net::IpAddr, sync::Arc};

use weir_packet::{Address, FlowKey, Ports};
use weir_policy::{Classifier, Compiler, EndpointId, PolicyDirection, RuleId, model::*};

use crate::{
    oracle::{self, Judged, Packet},
    world::edit::Edit,
};

/// What policy is asked about: a workload, whose packets are all local, or a host endpoint's packets of one kind.
pub type Subject<'model> = (&'model Endpoint, HostStage);

pub fn subjects(model: &Model) -> impl Iterator<Item = Subject<'_>> {
    let locals = model.endpoints.iter().map(|endpoint| &**endpoint).filter(|endpoint| endpoint.local);
    locals.flat_map(|endpoint| {
        let stages = match endpoint.kind {
            EndpointKind::Workload => &[HostStage::Local][..],
            EndpointKind::HostEndpoint => &HostStage::ALL,
            EndpointKind::NetworkSet => &[],
        };
        stages.iter().map(move |stage| (endpoint, *stage))
    })
}

/// What a classifier judges a subject as, if it knows it.
pub fn number(classifier: &Classifier, (endpoint, stage): Subject<'_>) -> Option<EndpointId> {
    match endpoint.kind {
        EndpointKind::HostEndpoint => {
            classifier.host_endpoint(&endpoint.name).map(|host| classifier.stage_endpoint(host, stage))
        }
        EndpointKind::Workload | EndpointKind::NetworkSet => classifier.endpoint(&endpoint.name),
    }
}

pub fn classify(classifier: &Classifier, subject: Subject<'_>, direction: PolicyDirection, packet: &Packet) -> Judged {
    let ports = Ports::new(packet.source_port, packet.destination_port);
    let protocol = packet.protocol;
    match (packet.source, packet.destination) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            judged(classifier, subject, direction, &FlowKey { src, dst, ports, protocol })
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            judged(classifier, subject, direction, &FlowKey { src, dst, ports, protocol })
        }
        _ => unreachable!("both ends are of one family"),
    }
}

fn judged<A: Address>(
    classifier: &Classifier,
    subject: Subject<'_>,
    direction: PolicyDirection,
    key: &FlowKey<A>,
) -> Judged {
    let (endpoint, stage) = subject;
    let number = number(classifier, subject).expect("a local endpoint");
    let judgement = match classifier.host_endpoint(&endpoint.name) {
        Some(host) if endpoint.kind == EndpointKind::HostEndpoint => {
            let judgement = classifier.judge_host(host, stage, direction, key);
            assert!(judgement.is_none() || classifier.has_stage(host, stage));
            judgement
        }
        _ => Some(classifier.judge(number, direction, key)),
    };
    let logged = classifier.logged(number, direction, key);
    assert!(logged.is_empty() || classifier.has_logs());
    let name = |rule: &RuleId| classifier.rule_name(*rule);
    Judged {
        decided: judgement.map(|judgement| (judgement.allow, name(&judgement.rule))),
        logged: logged.iter().map(name).collect(),
    }
}

/// That a classifier says what the linear evaluator says of the model.
pub fn agree(classifier: &Classifier, model: &Model, packets: &[Packet]) {
    for (endpoint, stage) in subjects(model) {
        for direction in PolicyDirection::ALL {
            for packet in packets {
                let seen = classify(classifier, (endpoint, stage), direction, packet);
                let expected = oracle::judge(model, endpoint, stage, direction, packet);
                assert_eq!(seen, expected, "{} {stage:?} {direction:?} {packet:?}", endpoint.name);
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
        for subject in subjects(&model) {
            let stamp =
                |classifier: &Classifier| classifier.stamp(number(classifier, subject).expect("a local endpoint"));
            assert_eq!(stamp(&followed), stamp(&fresh), "{subject:?}");
        }
    }
}
