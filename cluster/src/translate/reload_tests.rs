//! Loading again and again, with what is kept, beside loading afresh: the same models, problems and substitutes.

use std::{fmt::Write as _, fs, path::Path, sync::Arc};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

use super::*;

/// Everything that a load gives, without the numbers of objects, which depend on what came before.
fn outcome(loaded: &Result<(Loaded, Option<Problems>), Problems>) -> String {
    let lines = |problems: &Problems| serde_json::to_string_pretty(&problems.to_json()).expect("JSON");
    let (loaded, all) = match loaded {
        Ok((loaded, all)) => (loaded, all),
        Err(problems) => return format!("refused:\n{}", lines(problems)),
    };
    let mut text = format!("{:#?}\n{:#?}\n{:?}\n{:?}\n", loaded.cluster, loaded.faulty, loaded.counts, loaded.files);
    writeln!(text, "{:?}", loaded.undescribed).expect("a String takes it");
    let origin = |number: u32| loaded.objects.get(number).map(|origin| format!("{origin:?}"));
    let mut services = loaded.services.clone();
    for service in services.services.iter_mut().map(std::sync::Arc::make_mut) {
        writeln!(text, "{}: {:?}", service.name, origin(service.origin)).expect("a String takes it");
        service.origin = 0;
    }
    writeln!(text, "{services:#?}\n{:#?}\n{:?}", loaded.policy.endpoints, loaded.unserved_host_ports())
        .expect("a String takes it");
    for policy in loaded.policy.tiers.iter().flat_map(|tier| &tier.policies) {
        let parts = (&policy.selector, &policy.ingress, &policy.egress, origin(policy.origin));
        writeln!(text, "{}: {parts:#?}", policy.name).expect("a String takes it");
    }
    text + &lines(&loaded.notes) + &all.as_ref().map_or(String::new(), lines)
}

/// A made-up cluster's documents, edited step by step.
struct Editor {
    random: ChaCha8Rng,
    documents: Vec<String>,
    as_list: bool,
}

impl Editor {
    fn below(&mut self, bound: usize) -> usize {
        self.random.next_u32() as usize % bound
    }

    /// An object of any kind, most of them without a fault, in a few names that meet.
    fn document(&mut self) -> String {
        let (name, other, number) = (self.below(6), self.below(6), self.below(200));
        let bad = self.below(12) == 0;
        match self.below(10) {
            9 => format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{name}, namespace: x, labels: {{app: a{other}}}, annotations: \
                 {{cni.projectcalico.org/podIPs: 10.1.0.{}/32}}}}\nspec: {{nodeName: node-{}}}\n{}",
                number % 4,
                ["a", "b"][number % 2],
                if bad { "status: {podIP: 10.1.0.2}\n" } else { "" }
            ),
            7 => format!(
                "apiVersion: policy.networking.k8s.io/{}\nkind: ClusterNetworkPolicy\nmetadata: {{name: c{name}}}\nspec:\n  tier: Admin\n  \
                 priority: {number}\n  subject: {{namespaces: {{}}}}\n  egress:\n  - action: {}\n    to: [{{nodes: {{matchLabels: {{l: \
                 v{}}}}}}}]\n",
                ["v1alpha2", "v1beta1"][number % 2],
                if bad { "Maybe" } else { "Deny" },
                other % 3
            ),
            8 => format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{name}, namespace: x}}\nspec:\n  nodeName: node-a\n  containers: [{{name: \
                 c, ports: [{{containerPort: 80, hostPort: {}, hostIP: '{}'}}]}}]\nstatus: {{podIP: 10.1.0.{number}}}\n",
                8000 + number % 3,
                if bad { "here" } else { ["", "0.0.0.0", "192.168.0.1"][other % 3] }
            ),
            0 => format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: s{name}, namespace: x}}\nspec:\n  clusterIP: 10.96.{name}.{}\n  \
                 ports:\n  - {{name: a, port: {}, nodePort: {}}}\n  type: NodePort\n",
                if bad { 300 } else { number },
                80 + other,
                30000 + number
            ),
            1 => format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: e{name}\n  namespace: x\n  labels: \
                 {{kubernetes.io/service-name: s{other}}}\naddressType: {}\nports: [{{name: a, port: 8080}}]\nendpoints:\n- addresses: \
                 [10.1.0.{number}]\n  nodeName: node-a\n- addresses: [10.1.1.{number}]\n  # far away\n  conditions: {{ready: false}}\n",
                if bad { "IPv7" } else { "IPv4" }
            ),
            2 => format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{name}, namespace: x, labels: {{app: a{other}}}, uid: u{}{}}}\nspec:\n  \
                 nodeName: node-{}\n  containers: [{{name: c, ports: [{{name: web, containerPort: {}}}]}}]\nstatus: {{podIP: \
                 10.1.0.{number}}}\n",
                number % 2,
                if number % 5 == 0 { ", deletionTimestamp: '2026-01-01T00:00:00Z'" } else { "" },
                if number % 7 == 0 { "b" } else { "a" },
                if bad { 0 } else { 8080 }
            ),
            3 => format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  name: n{name}\n  namespace: x\nspec:\n  \
                 podSelector: {{matchLabels: {{app: a{other}}}}}\n  ingress:\n  - {}: [{{ipBlock: {{cidr: 10.1.0.0/{}}}}}]\n",
                if bad { "form" } else { "from" },
                16 + number % 8
            ),
            4 => format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: x, labels: {{l: v{number}}}}}\n"),
            _ if bad => {
                ["kind: Pod\n", "a: [\n", "- 1\n", "apiVersion: v1\nkind: Pod\nkind: Pod\nmetadata: {name: p1}\n"]
                    [number % 4]
                    .to_owned()
            }
            _ => format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: node-{}, labels: {{l: v{}}}}}\nspec: {{podCIDRs: [10.1.0.0/{}]}}\nstatus:\n  \
                 addresses: [{{type: InternalIP, address: 192.168.0.{number}}}]\n",
                ["a", "b"][name % 2],
                other % 3,
                24 + number % 8
            ),
        }
    }

    fn edit(&mut self) {
        let documents = self.documents.len().max(1);
        let (at, to) = (self.below(documents), self.below(documents));
        let document = self.document();
        match self.below(10) {
            0..=2 if !self.documents.is_empty() => self.documents[at] = document,
            3 if !self.documents.is_empty() => drop(self.documents.remove(at)),
            4 if !self.documents.is_empty() => self.documents.swap(at, to),
            // Everything behind it moves.
            5 if !self.documents.is_empty() => self.documents[at].insert_str(0, "# one line more\n"),
            6 => self.as_list = !self.as_list,
            _ if self.documents.len() < 12 => self.documents.insert(at.min(self.documents.len()), document),
            _ => self.documents.clear(),
        }
    }

    /// A pod made, made again, or taken away; addresses meet those of objects.
    fn edit_pods(&mut self, pods: &mut LocalPods) {
        let (name, number) = (format!("x/p{}", self.below(6)), self.below(200));
        if self.below(3) == 0 {
            return pods.remove(&name);
        }
        pods.insert(Arc::new(LocalPod {
            uid: [None, Some("u0"), Some("u1")][self.below(3)].map(str::to_owned),
            sandbox: number.to_string(),
            device: format!("cali{number}"),
            mac: weir_packet::Mac([2, 0, 0, 0, 0, number as u8]),
            addresses: vec![format!("10.1.0.{number}").parse().unwrap()],
            name,
        }));
    }

    fn text(&self) -> String {
        if !self.as_list {
            return self.documents.join("---\n");
        }
        let mut text = "apiVersion: v1\nitems:\n".to_owned();
        for document in &self.documents {
            for (number, line) in document.lines().enumerate() {
                writeln!(text, "{}{line}", if number == 0 { "- " } else { "  " }).expect("a String takes it");
            }
        }
        text + "kind: List\nmetadata: {resourceVersion: \"\"}\n"
    }
}

#[test]
fn what_is_kept_from_load_to_load_changes_no_outcome() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.yaml");
    fs::write(&path, "nodeName: node-a\nmanifests: [one.yaml, two.yaml]\n").unwrap();
    let mut editors = [1, 2].map(|seed| Editor {
        random: ChaCha8Rng::seed_from_u64(seed),
        documents: Vec::new(),
        as_list: seed == 1,
    });
    let write = |editor: &Editor, name: &str| fs::write(folder.path().join(name), editor.text()).unwrap();
    write(&editors[0], "one.yaml");
    write(&editors[1], "two.yaml");
    let mut keeping = Loader::new(&path);
    let mut previous = keeping.load_strictly().unwrap();
    let mut previous_afresh = keeping.afresh().load_strictly().unwrap();
    let (mut refused, mut with_faults, mut of_pods) = (0, 0, 0);
    let (mut pods, mut is_refused) = (LocalPods::default(), false);
    for step in 0..600 {
        let which = usize::from(step % 3 == 0);
        let only_pods = step % 4 == 1;
        if only_pods || step % 8 == 2 {
            editors[which].edit_pods(&mut pods);
            keeping.set_local_pods(Arc::new(pods.clone()));
        }
        if !only_pods {
            editors[which].edit();
            write(&editors[which], ["one.yaml", "two.yaml"][which]);
        }
        // After a refusal the files say something else than what is in force.
        let unread = only_pods && !is_refused;
        // Else a text that became empty would stay for a while.
        keeping.revisit.believe();
        of_pods += usize::from(unread);
        let kept =
            if unread { keeping.reload_local_pods(&previous.objects) } else { keeping.reload(&previous.objects) };
        let afresh = keeping.afresh().reload(&previous_afresh.objects);
        let (kept_outcome, afresh_outcome) = (outcome(&kept), outcome(&afresh));
        let differing = kept_outcome.lines().zip(afresh_outcome.lines()).find(|(kept, afresh)| kept != afresh);
        assert!(
            kept_outcome == afresh_outcome,
            "step {step}: {differing:?}\n{}",
            editors.each_ref().map(Editor::text).join("\n=====\n")
        );
        is_refused = kept.is_err();
        match (kept, afresh) {
            (Ok((kept, all)), Ok((afresh, _))) => {
                with_faults += usize::from(all.is_some());
                (previous, previous_afresh) = (kept, afresh);
            }
            _ => refused += 1,
        }
    }
    assert!(with_faults > 40 && refused < 300, "{with_faults} with faults, {refused} refused");
    assert!(of_pods > 100, "{of_pods} without a look at the files");
}

/// The documents of a list that kubectl wrote and those of a stream are read to the same objects, each by itself.
#[test]
fn an_unchanged_object_is_the_same_one_wherever_it_moves_to() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let namespace = |name: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n");
    let item = |name: &str| namespace(name).replace('\n', "\n  ").trim_end().to_owned() + "\n";
    fs::write(path("weir.yaml"), "nodeName: a\nmanifests: [m.yaml]\n").unwrap();
    let stream = |names: &[&str]| names.iter().map(|name| namespace(name)).collect::<Vec<_>>().join("---\n");
    let list = |names: &[&str]| {
        let items: String = names.iter().map(|name| format!("- {}", item(name))).collect();
        format!("apiVersion: v1\nitems:\n{items}kind: List\n")
    };
    for text in [&stream as &dyn Fn(&[&str]) -> String, &list] {
        let mut library = Library::default();
        let mut read = |text: String| {
            fs::write(path("m.yaml"), text).unwrap();
            let mut problems = Problems::default();
            problems.add_source(crate::text::Source::new("weir.yaml", String::new()));
            let texts = library.read(&[path("m.yaml")], &[], Path::new("weir.yaml"), true, &mut problems);
            let manifests = Manifests::of(texts.pieces(), &BTreeMap::new(), &mut Chunks::default(), &mut problems);
            assert!(problems.diagnostics().is_empty(), "{problems}");
            let place = |at: crate::resources::at::At<'_>| problems.place(at.span());
            let objects = manifests.namespaces().iter();
            objects
                .map(|object| (object.name.clone(), object.content().clone(), object.origin, place(object.at())))
                .collect::<Vec<_>>()
        };
        let before = read(text(&["a", "b", "c"]));
        let after = read(text(&["new", "b", "a"]));
        let same = |old: usize, new: usize| {
            let ((old_name, old_content, old_origin, _), (name, content, origin, _)) = (&before[old], &after[new]);
            old_name == name && std::sync::Arc::ptr_eq(old_content, content) && old_origin == origin
        };
        assert!(same(1, 1) && same(0, 2), "{before:?} {after:?}");
        assert!(before[2].3 == after[2].3 && before[0].3 != after[2].3, "{before:?} {after:?}");
    }
}

/// Services by name, with the outcome's faulty objects and what is stale.
fn begun(loader: &mut Loader, previous: Option<&Manifests>) -> (Vec<String>, Vec<String>, Vec<String>, Loaded) {
    let outcome = match previous {
        Some(previous) => loader.reload(previous),
        None => loader.start(),
    };
    let (loaded, _) = outcome.unwrap_or_else(|problems| panic!("{problems}"));
    let services =
        loaded.services.services.iter().map(|service| format!("{} {}", service.name, service.cluster_ips[0]));
    let faulty = loaded.faulty.iter().map(|faulty| format!("{}: {:?}", faulty.object, faulty.substitute));
    let stale = loaded.stale.iter().flat_map(|stale| stale.objects.clone());
    (services.collect(), faulty.collect(), stale.collect(), loaded)
}

#[test]
fn a_start_begins_from_what_was_in_force_where_its_sources_are_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (state, shown) = (path("state"), |name: &str| path(name).display().to_string());
    fs::create_dir(path("m")).unwrap();
    fs::write(path("weir.yaml"), "nodeName: a\nmanifests: [one.yaml, two.yaml, m]\n").unwrap();
    let service = |name: &str, ip: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
        )
    };
    let write = |name: &str, text: &str| fs::write(path(name), text).unwrap();
    write("one.yaml", &(service("s1", "10.96.0.1") + "---\n" + &service("s2", "10.96.0.2")));
    write("two.yaml", &service("s3", "10.96.0.3"));
    write("m/four.yaml", &service("s4", "10.96.0.4"));
    let keep = |loaded: &Loaded| crate::sources::keep::Kept::write(&state, &loaded.in_force).unwrap();
    let next_run = || {
        let mut loader = Loader::new(&path("weir.yaml"));
        loader.begin_from(crate::sources::keep::Kept::read(&state).unwrap().unwrap());
        loader
    };
    let mut loader = Loader::new(&path("weir.yaml"));
    let (services, faulty, stale, loaded) = begun(&mut loader, None);
    assert_eq!((services.len(), faulty.len(), stale.len()), (4, 0, 0));
    assert!(keep(&loaded));

    // A fault at run time: what is kept of that text is the last one that was good.
    write("two.yaml", &service("s3", "10.96.0.300"));
    let (services, faulty, _, loaded) = begun(&mut loader, Some(&loaded.objects));
    assert!(services.contains(&"default/s3 10.96.0.3".to_owned()) && faulty == ["Service default/s3: LastGood"]);
    assert!(!keep(&loaded), "nothing else is in force");

    // The next run finds that fault, a text cut in the middle, and its folder gone.
    write("one.yaml", &(service("s1", "10.96.0.11") + "---\n{"));
    fs::rename(path("m"), path("away")).unwrap();
    let mut loader = next_run();
    let (mut services, mut faulty, mut stale, loaded) = begun(&mut loader, None);
    let all = ["default/s1 10.96.0.11", "default/s2 10.96.0.2", "default/s3 10.96.0.3", "default/s4 10.96.0.4"];
    services.sort();
    assert_eq!(services, all);
    let mut objects = ["Service default/s2".to_owned(), "Service default/s3".into(), shown("m/four.yaml")];
    faulty.sort();
    stale.sort();
    objects.sort();
    assert_eq!((faulty, &stale[..]), (objects.iter().map(|o| format!("{o}: LastGood")).collect(), &objects[..]));
    assert!(loaded.stale.as_ref().unwrap().since_unix_seconds > 1_700_000_000);
    assert!(!keep(&loaded), "a start that begins from what is kept keeps it");

    // Once more, as if that had been killed; then all is mended, one by one, and what breaks again is not stale.
    let mut loader = next_run();
    let (services, _, stale, loaded) = begun(&mut loader, None);
    assert_eq!((services.len(), stale.len()), (4, 3));
    fs::rename(path("away"), path("m")).unwrap();
    write("two.yaml", &service("s3", "10.96.0.33"));
    let (_, faulty, stale, loaded) = begun(&mut loader, Some(&loaded.objects));
    assert_eq!(
        (faulty, stale),
        (vec!["Service default/s2: LastGood".to_owned()], vec!["Service default/s2".to_owned()])
    );
    write("one.yaml", &service("s1", "10.96.0.12"));
    write("two.yaml", &service("s3", "10.96.0.300"));
    let (services, faulty, stale, loaded) = begun(&mut loader, Some(&loaded.objects));
    assert_eq!(services, ["default/s1 10.96.0.12", "default/s4 10.96.0.4", "default/s3 10.96.0.33"]);
    assert_eq!((faulty.len(), stale.len()), (1, 0));
    assert!(keep(&loaded));

    // A bad weir.yaml is refused as ever, and without anything kept there is nothing to begin from.
    fs::rename(path("m"), path("away")).unwrap();
    assert!(Loader::new(&path("weir.yaml")).start().is_err());
    write("weir.yaml", "nodeName: a\nmanifests: [one.yaml]\ntypo: 1\n");
    assert!(next_run().start().is_err());
}

/// A cluster of many services, in which slices change, and now and then something else: what is passed over changes no outcome, and most is.
#[test]
fn what_is_passed_over_as_nothing_changed_changes_no_outcome() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.yaml");
    fs::write(&path, "nodeName: node-a\nmanifests: [m]\n").unwrap();
    fs::create_dir(folder.path().join("m")).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut below = move |bound: u32| random.next_u32() % bound;
    const FILES: u32 = 8;
    let write = |file: u32, text: &str| fs::write(folder.path().join(format!("m/{file}.yaml")), text).unwrap();
    // What changes nothing but endpoints, most often; else: a port, a pod, a fault, a note, a policy for the endpoints of services.
    let text = |below: &mut dyn FnMut(u32) -> u32, file: u32, odd: u32| {
        let mut text = String::new();
        for service in file * 4..file * 4 + 4 {
            let port = if odd == 1 { 80 + below(3) } else { 80 };
            let ip = if service % 4 == 3 { "None".to_owned() } else { format!("10.96.0.{}", service + 1) };
            writeln!(
                text,
                "apiVersion: v1\nkind: Service\nmetadata: {{name: s{service}, namespace: x}}\nspec: {{clusterIP: {ip}, ports: [{{name: a, \
                 port: {port}}}]}}\n---"
            )
            .unwrap();
            for slice in 0..below(3) {
                let of = if odd == 2 { below(FILES * 5) } else { service };
                writeln!(
                    text,
                    "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: e{service}-{slice}, namespace: x, labels: \
                     {{kubernetes.io/service-name: s{of}}}}}\naddressType: {}\nports: [{{name: {}, port: 8080}}]\nendpoints:",
                    if odd == 3 { "IPv7" } else { "IPv4" },
                    ["a", "a", "a", "b"][below(4) as usize],
                )
                .unwrap();
                (0..below(4)).for_each(|_| {
                    writeln!(text, "- {{addresses: [10.1.0.{}], nodeName: node-a}}", below(9) + 1).unwrap();
                });
                text.push_str("---\n");
            }
        }
        if odd == 4 {
            text.push_str("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n---\n");
        }
        if file.is_multiple_of(2) {
            let number = if below(12) == 0 { below(3) } else { file % 3 };
            writeln!(
                text,
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{file}, namespace: x}}\nspec: {{nodeName: node-a, containers: [{{name: \
                 c, ports: [{{containerPort: 80, hostPort: {}}}]}}]}}\nstatus: {{podIP: 10.1.{file}.{number}}}\n---",
                8000 + number
            )
            .unwrap();
        }
        if odd == 5 {
            text.push_str(
                "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: n, namespace: x}\nspec: {egress: [{action: Allow, \
                 destination: {services: {name: s0, namespace: x}}}]}\n---\n",
            );
        }
        text
    };
    (0..FILES).for_each(|file| write(file, &text(&mut below, file, 0)));
    let mut keeping = Loader::new(&path);
    let mut previous = keeping.load_strictly().unwrap();
    let mut previous_afresh = keeping.afresh().load_strictly().unwrap();
    let mut compiler = weir_nat::Compiler::default();
    let mut before = compiler.compile(&previous.services).unwrap();
    let (mut same_pods, mut of_endpoints, mut with_faults) = (0, 0, 0);
    for step in 0..200 {
        for _ in 0..=below(2) {
            let odd = if below(6) == 0 { below(6) } else { 0 };
            let file = below(FILES);
            write(file, &text(&mut below, file, odd));
        }
        keeping.revisit.believe();
        let kept = keeping.reload(&previous.objects);
        let afresh = keeping.afresh().reload(&previous_afresh.objects);
        let (kept_outcome, afresh_outcome) = (outcome(&kept), outcome(&afresh));
        let differing = kept_outcome.lines().zip(afresh_outcome.lines()).find(|(kept, afresh)| kept != afresh);
        assert!(kept_outcome == afresh_outcome, "step {step}: {differing:?}");
        let (Ok((kept, all)), Ok((afresh, _))) = (kept, afresh) else { panic!("step {step}: refused") };
        with_faults += usize::from(all.is_some());
        same_pods += usize::from(Arc::ptr_eq(&kept.cluster, &previous.cluster));
        let table = compiler.compile(&kept.services).unwrap();
        of_endpoints += usize::from(table.differs_in_endpoints_only(&before));
        (previous, previous_afresh, before) = (kept, afresh, table);
    }
    assert!(with_faults > 10, "{with_faults} with faults");
    assert!(same_pods > 60 && of_endpoints > 25, "{same_pods} with the same pods, {of_endpoints} with the same ports");
}
