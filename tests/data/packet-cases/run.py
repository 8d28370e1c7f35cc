#!/usr/bin/env python3
"""Runs the cases of this folder through `weir replay`, with the packets and the matching of tests/cases/packets.py.

    run.py WEIR [--only REGEX] [--keep DIR] [--show N]

The cases are Python because most exist in two address families and share one cluster; what is expected of each was written from the rules and
RFCs named in `basis`, never taken from weir's output.  A replay covers as many steps as it can, outputs belong to steps by their time; one
ends where a later input needs what came out before, or where connections are to be looked at.  --keep leaves the cases, inputs and outputs.
"""
import argparse, concurrent.futures, importlib, json, os, re, shlex, shutil, struct, subprocess, sys, tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path[:0] = [HERE, os.path.join(HERE, '..', '..', 'cases')]
import packets, world                                                # noqa: E402

TOPICS = sorted(n[:-3] for n in os.listdir(HERE) if n.endswith('.py') and n not in ('run.py', 'world.py'))


def read_capture(path):
    """[(seconds from the start, frame)]"""
    with open(path, 'rb') as f:
        b = f.read()
    out, at = [], 24
    while at < len(b):
        seconds, micros, size = struct.unpack('<III', b[at:at + 12])
        out.append((seconds - packets.BASE_S + micros / 1e6, b[at + 16:at + 16 + size]))
        at += 16 + size
    return out


class Replay:
    """One case: its inputs so far, and what came out of the last run."""

    def __init__(self, command, folder, arguments):
        self.command, self.folder, self.arguments = command, folder, arguments
        self.sent, self.count, self.seen = {}, 0, {}

    def run(self, frames):
        """Runs the case with `frames` added: (new outputs as [(time, device, packet)], counters, connections)."""
        for t, device, frame in frames:
            self.sent.setdefault(device, []).append((t, frame))
        self.count += len(frames)
        out = os.path.join(self.folder, 'out')
        shutil.rmtree(out, ignore_errors=True)
        command = [*self.command, 'replay', '-c', os.path.join(self.folder, 'weir.yaml'), '--out', out, '--seed', '7', *self.arguments]
        for device, sent in self.sent.items():
            path = os.path.join(self.folder, 'in-%s.pcap' % device)
            packets.write_pcap(path, sent)
            command += ['--in', '%s=%s' % (device, path)]
        done = subprocess.run(command, capture_output=True, timeout=300)
        if done.returncode:
            raise ValueError('exit status %d: %s' % (done.returncode, done.stderr.decode('utf8', 'replace').strip()[-600:]))
        new = []
        for name in sorted(os.listdir(out)):
            if name.endswith('.pcap'):
                device, old = name[:-5], self.seen.get(name[:-5], [])
                got = read_capture(os.path.join(out, name))
                if got[:len(old)] != old:
                    raise ValueError('what %s had sent changed when later packets were added' % device)
                new += [(t, device, packets.dissect(frame)) for t, frame in got[len(old):]]
                self.seen[device] = got
        counters, connections = (json.load(open(os.path.join(out, name + '.json'))) for name in ('counters', 'conntrack'))
        host = len(self.seen.get('host', []))
        why = packets.check_counters(counters, self.count, sum(map(len, self.seen.values())) - host, host, {0})
        if why:
            raise ValueError(why)
        return new, counters, connections


def run_case(case, replay):
    """[(step, None or why it does not agree)]"""
    steps, results, bound, dropped, number = case['steps'], [], {}, 0, 0
    while number < len(steps):
        batch, frames = [], []
        for step in steps[number:]:
            try:
                frames += packets.step_frames(step, bound)
            except (packets.Unbound, KeyError) as missing:
                if not batch:
                    return results + [('%s/%d' % (case['name'], number + 1), '%s was never seen' % missing)]
                break
            batch.append(step)
            if 'conntrack' in step:
                break
        new, counters, connections = replay.run(frames)
        due = 0
        for k, step in enumerate(batch):
            begin, end = step['t'] - 5e-7, batch[k + 1]['t'] - 5e-7 if k + 1 < len(batch) else float('inf')
            matched, why = packets.compare(step, [(d, p) for t, d, p in new if begin <= t < end], bound, case['mtus'])
            bound = matched if matched is not None else bound
            due += bool(step.get('drop'))
            if why is None and step.get('reason') and not any(re.search(step['reason'], r, re.I) for r in counters['drops']):
                why = 'no drop reason like %s: %s' % (step['reason'], counters['drops'])
            if why is None and 'conntrack' in step:
                why = packets.check_conntrack(step['conntrack'], connections, bound)
            number += 1
            results.append(('%s/%d %s' % (case['name'], number, step['note']), why))
        total = sum(counters['drops'].values())
        if total < dropped + due and all(why is None for _, why in results):
            results[-1] = results[-1][0], 'up to here %d drops are due, but there were %d' % (due, total - dropped)
        dropped = total
    positive = [why for (_, why), step in zip(results, steps) if packets.demands_output(step)]
    if positive and all(positive):
        return [(label, why or 'nothing passes in this case, so a drop proves nothing') for label, why in results]
    return results


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('weir')
    a.add_argument('--only', default='')
    a.add_argument('--keep')
    a.add_argument('--show', type=int, default=60)
    o = a.parse_args()
    for topic in TOPICS:
        importlib.import_module(topic)
    names = sorted(n for n in world.CASES if re.search(o.only, n))
    if not names:
        print('no case matches', file=sys.stderr)
        return 2
    root = o.keep or tempfile.mkdtemp(prefix='packet-cases')

    def one(name):
        folder = os.path.join(root, name)
        shutil.rmtree(folder, ignore_errors=True)
        arguments = world.CASES[name].write(folder)
        try:
            return run_case({**packets.load(folder), 'name': name}, Replay(shlex.split(o.weir), folder, arguments))
        except ValueError as why:
            return [(name + '/', str(why))]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = [x for r in pool.map(one, names) for x in r]
    if not o.keep:
        shutil.rmtree(root)
    bad = [x for x in results if x[1]]
    for label, why in bad[:o.show]:
        print('%s\n    %s' % (label, why))
    print('cases: %d of %d agree' % (len(names) - len({label.split('/')[0] for label, _ in bad}), len(names)))
    print('packets: %d of %d steps agree' % (len(results) - len(bad), len(results)))
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
