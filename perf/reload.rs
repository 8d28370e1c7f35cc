//! From a changed file to compiled tables: how long a load takes, a reload after a change of one file of a hundred documents, and one for a pod
//! that the CNI plugin has made, at growing numbers of services with ten endpoints each.
//!
//! The cluster is one of 50 Services and 50 EndpointSlices per file, as many files as that takes. A change gives every slice of one file another
//! endpoint. What a reload costs beyond this (the kernel's maps and routes, waiting for further changes) is in the router's log.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

// For the allocator that `weir` has.
use weir as _;
use weir_benches::figures::{Spread, tell};
use weir_cluster::{
    compile::{self, Compilers},
    translate::{Loaded, Loader, LocalPod, LocalPods, workload_device},
};
use weir_dataplane::{forwarding::Forwarding, snapshot::Rules};

const ENDPOINTS: u32 = 10;
const SERVICES_PER_FILE: u32 = 50;
const ROUNDS: u32 = 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sizes: Vec<u32> = std::env::args().skip(1).map(|size| size.parse()).collect::<Result<_, _>>()?;
    let sizes = if sizes.is_empty() { vec![10, 100, 1000, 10_000, 50_000] } else { sizes };
    println!("times in ms; a change is of one file of 100 documents; medians of {ROUNDS}");
    println!(
        "| services | load: read | translate | compile | change: read | translate | compile | forwarding | pod: translate | compile | \
         MB of text | table | held |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    for services in sizes {
        measure(services)?;
    }
    Ok(())
}

/// One line of the table.
fn measure(services: u32) -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let held_before = resident_bytes()?;
    let text_bytes = write_cluster(folder.path(), services)?;
    let mut loader = Loader::new(&folder.path().join("weir.yaml"));
    let mut loaded = loader.load_strictly().map_err(|problems| problems.render(false))?;
    let [load_read, load_translate] = [loaded.times.read, loaded.times.translate];
    let mut compilers = Compilers::default();
    let (rules, load_compile) = compiled(&loaded, &mut compilers)?;
    let table_bytes = rules.services.memory_bytes();
    let mut steps: [Vec<Duration>; 4] = Default::default();
    for round in 1..=ROUNDS {
        let changed = services / 2 / SERVICES_PER_FILE;
        write_file(folder.path(), changed, services, round)?;
        let (next, _) = loader.reload(&loaded.objects).map_err(|problems| problems.render(false))?;
        let (rules, compile) = compiled(&next, &mut compilers)?;
        assert_eq!(rules.services.memory_bytes(), table_bytes, "as many endpoints as before");
        let begin = Instant::now();
        let forwarding = Forwarding::compile(&next.cluster, &compile::links_of(&next.config))?;
        let took = [next.times.read, next.times.translate, compile, begin.elapsed()];
        drop((rules, forwarding));
        steps.iter_mut().zip(took).for_each(|(step, took)| step.push(took));
        loaded = next;
    }
    let mut pod_steps: [Vec<Duration>; 2] = Default::default();
    let mut pods = LocalPods::default();
    for round in 1..=ROUNDS {
        pods.insert(Arc::new(pod(round as u8)));
        loader.set_local_pods(Arc::new(pods.clone()));
        let (next, _) = loader.reload_local_pods(&loaded.objects).map_err(|problems| problems.render(false))?;
        assert_eq!(next.cluster.workloads.len(), round as usize, "one more");
        let (rules, compile) = compiled(&next, &mut compilers)?;
        drop(rules);
        pod_steps.iter_mut().zip([next.times.translate, compile]).for_each(|(step, took)| step.push(took));
        loaded = next;
    }
    // What is free is given back within ten seconds.
    std::thread::sleep(Duration::from_secs(12));
    let held_bytes = resident_bytes()?.saturating_sub(held_before);
    let row = format!("{services} services");
    let [read, translate, compile, forwarding] = steps;
    let [pod_translate, pod_compile] = pod_steps;
    print!("| {services} |");
    for (column, step) in [
        ("load: read", vec![load_read]),
        ("load: translate", vec![load_translate]),
        ("load: compile", vec![load_compile]),
        ("change: read", read),
        ("change: translate", translate),
        ("change: compile", compile),
        ("change: forwarding", forwarding),
        ("pod: translate", pod_translate),
        ("pod: compile", pod_compile),
    ] {
        let spread = Spread::of(&mut step.iter().map(|time| time.as_secs_f64() * 1e3).collect::<Vec<_>>());
        print!(" {:.1} |", spread.median);
        tell("reload", &row, column, "ms", spread);
    }
    for (column, bytes) in [("text", text_bytes), ("service table", table_bytes), ("held", held_bytes)] {
        let megabytes = bytes as f64 / 1e6;
        print!(" {megabytes:.1} MB |");
        tell("memory for reloads", &row, column, "MB", Spread::of(&mut [megabytes]));
    }
    println!();
    Ok(())
}

/// A pod of this node without an object.
fn pod(number: u8) -> LocalPod {
    LocalPod {
        name: format!("namespace-1/pod-{number}"),
        uid: None,
        sandbox: String::new(),
        device: workload_device("namespace-1", &format!("pod-{number}")),
        mac: weir_packet::Mac([2, 0, 0, 0, 0, number]),
        addresses: vec![[10, 200, 0, number].into()],
    }
}

fn compiled(loaded: &Loaded, compilers: &mut Compilers) -> Result<(Rules, Duration), compile::CompileError> {
    let begin = Instant::now();
    let rules = compilers.rules(loaded)?;
    Ok((rules, begin.elapsed()))
}

/// Writes weir.yaml and all files; how many bytes of manifests.
fn write_cluster(folder: &Path, services: u32) -> io::Result<usize> {
    fs::write(folder.join("weir.yaml"), "nodeName: node-1\nmanifests: [manifests/]\n")?;
    fs::create_dir(folder.join("manifests"))?;
    (0..services.div_ceil(SERVICES_PER_FILE)).map(|file| write_file(folder, file, services, 0)).sum()
}

fn write_file(folder: &Path, file: u32, services: u32, round: u32) -> io::Result<usize> {
    let first = file * SERVICES_PER_FILE;
    let text: String = (first..services.min(first + SERVICES_PER_FILE)).map(|n| documents(n, round)).collect();
    let path: PathBuf = folder.join(format!("manifests/{file:05}.yaml"));
    fs::write(path, &text)?;
    Ok(text.len())
}

/// A Service and its EndpointSlice, as kubectl prints them but for what nobody reads.
fn documents(number: u32, round: u32) -> String {
    let [high, low] = (number as u16).to_be_bytes();
    let mut text = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: service-{number}\n  namespace: namespace-{}\n  labels:\n    app: \
         app-{number}\nspec:\n  clusterIP: 10.96.{high}.{low}\n  clusterIPs:\n  - 10.96.{high}.{low}\n  internalTrafficPolicy: Cluster\n  \
         ipFamilies:\n  - IPv4\n  ipFamilyPolicy: SingleStack\n  ports:\n  - name: http\n    port: 80\n    protocol: TCP\n    targetPort: \
         8080\n  selector:\n    app: app-{number}\n  sessionAffinity: None\n  type: ClusterIP\nstatus:\n  loadBalancer: {{}}\n---\n\
         addressType: IPv4\napiVersion: discovery.k8s.io/v1\nendpoints:\n",
        number % 50
    );
    for endpoint in 0..ENDPOINTS {
        // Every round moves the first endpoint.
        let moved = if endpoint == 0 { round } else { 0 };
        let [_, a, b, c] = (number * ENDPOINTS + endpoint + (moved << 20)).to_be_bytes();
        writeln!(
            text,
            "- addresses:\n  - 10.{a}.{b}.{c}\n  conditions:\n    ready: true\n    serving: true\n    terminating: false\n  nodeName: \
             node-{}\n  targetRef:\n    kind: Pod\n    name: pod-{number}-{endpoint}\n    namespace: namespace-{}\n  zone: zone-a",
            endpoint * 7 % 100,
            number % 50
        )
        .expect("a String takes it");
    }
    write!(
        text,
        "kind: EndpointSlice\nmetadata:\n  labels:\n    endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io\n    \
         kubernetes.io/service-name: service-{number}\n  name: service-{number}-abcde\n  namespace: namespace-{}\nports:\n- name: http\n  \
         port: 8080\n  protocol: TCP\n",
        number % 50
    )
    .expect("a String takes it");
    text
}

/// This process's memory in RAM, which is only telling for the first size that is asked for: others use what that one left.
fn resident_bytes() -> io::Result<usize> {
    let pages: Option<usize> = fs::read_to_string("/proc/self/statm")?.split(' ').nth(1).and_then(|p| p.parse().ok());
    Ok(pages.unwrap_or_default() * 4096)
}
