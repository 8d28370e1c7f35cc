"""Connection tracking: TCP's states and windows as netfilter names them, timeouts of every state, SCTP, UDP, what opens no connection."""
from world import *


def entry(f, state, tcp_state, sport=40000):
    return connection('tcp', (f.a1, sport, f.a2, 80), None, state, tcp_state)


class Dialogue:
    """TCP between pods a1 and a2, forwarded untranslated: writes the packets and what is expected of them."""

    def __init__(self, c, f, sport=40000):
        self.c, self.f, self.sport = c, f, sport

    def segment(self, ours, flags, seq, ack=0, payload=None, **more):
        f = self.f
        fields = {k: more.pop(k) for k in list(more) if k in ('win', 'options', 'chksum', 'urg')}
        if ours:
            return POD1, POD2, packet(f.a1, f.a2, tcp(self.sport, 80, flags, seq, ack, **fields), payload=payload, **more)
        return POD2, POD1, packet(f.a2, f.a1, tcp(80, self.sport, flags, seq, ack, **fields), payload=payload, **more)

    def passes(self, ours, flags, seq, ack=0, payload=None, state=None, note='', at=None, after=0.01, **more):
        source, target, p = self.segment(ours, flags, seq, ack, payload, **more)
        self.c.step((source, p), [out(target, p)], note or '%s %s' % ('>' if ours else '<', flags), at=at, after=after,
                    **({'connections': [entry(self.f, None, state, self.sport)]} if state else {}))
        return self

    def refused(self, ours, flags, seq, ack=0, payload=None, state=None, note='', at=None, after=0.01, passes_too=False, **more):
        source, target, p = self.segment(ours, flags, seq, ack, payload, **more)
        kept = {'connections': {'contains': [entry(self.f, None, state, self.sport)] if state else [], 'count': 1 if state else 0}}
        if passes_too:
            self.c.step((source, p), any_of=[[], [out(target, p)]], note=note or 'stray ' + flags, at=at, after=after, allow_bad=True, **kept)
        else:
            self.c.step((source, p), [], note or 'stray ' + flags, at=at, after=after, **kept)
        return self

    def open(self):
        return self.passes(True, 'S', 1000, state='SYN_SENT').passes(False, 'SA', 5000, 1001, state='SYN_RECV') \
            .passes(True, 'A', 1001, 5001, state='ESTABLISHED')

    def bystander(self, at, present, note, sport=None):
        """A packet of something else at a time: is the connection still there?"""
        f = self.f
        p = packet(f.a2, f.a1, echo(f, ident=9), payload='clock')
        want = entry(f, None, present or None, self.sport)
        self.c.step((POD2, p), [out(POD1, p)], note, at=at,
                    connections={'contains': [want]} if present else {'absent': [entry(f, None, None, self.sport)]})
        return self


def tcp_states(f):
    c = Case('tcp-simultaneous-open-%s' % f.name, 'SYN meets SYN', 'RFC 9293 3.5; netfilter SYN_SENT2')
    d = Dialogue(c, f)
    d.passes(True, 'S', 1000, state='SYN_SENT').passes(False, 'S', 5000, state='SYN_SENT2')
    d.passes(True, 'SA', 1000, 5001, state='SYN_RECV').passes(False, 'SA', 5000, 1001).passes(True, 'A', 1001, 5001, state='ESTABLISHED')
    d.passes(False, 'A', 5001, 1001, state='ESTABLISHED')

    c = Case('tcp-refused-%s' % f.name, 'A RST answers the SYN: closed', 'RFC 9293 3.5.2')
    Dialogue(c, f).passes(True, 'S', 1000, state='SYN_SENT').passes(False, 'RA', 0, 1001, note='RST: nothing is left of it') \
        .passes(True, 'S', 7000, state='SYN_SENT', note='and the port may be used at once')

    c = Case('tcp-reset-valid-only-%s' % f.name, 'A RST counts only at the exact sequence number', 'RFC 5961 3.2')
    d = Dialogue(c, f).open()
    d.passes(False, 'PA', 5001, 1001, payload='hello', state='ESTABLISHED').passes(True, 'A', 1001, 5006, state='ESTABLISHED')
    d.refused(False, 'R', 900000000, state='ESTABLISHED', note='far out of the window', passes_too=True)
    d.refused(False, 'R', 5001, state='ESTABLISHED', note='behind what was acknowledged', passes_too=True)
    d.refused(False, 'R', 5010, state='ESTABLISHED', note='in the window, but not the next number', passes_too=True)
    d.refused(False, 'RA', 5006, 1001, state='ESTABLISHED', note='the right one, but its checksum is wrong', passes_too=True, chksum='bad')
    d.passes(True, 'PA', 1001, 5006, payload='still alive', state='ESTABLISHED')
    d.passes(False, 'RA', 5006, 1012, state='CLOSE', note='the right one')

    c = Case('tcp-stray-syn-%s' % f.name, 'A SYN in an established connection changes nothing', 'RFC 5961 4.2; netfilter')
    d = Dialogue(c, f).open()
    d.refused(True, 'S', 999000, state='ESTABLISHED', passes_too=True)
    d.refused(True, 'S', 1001, state='ESTABLISHED', passes_too=True)
    d.refused(False, 'S', 5001, state='ESTABLISHED', passes_too=True)
    d.refused(False, 'SA', 700000, 700000, state='ESTABLISHED', passes_too=True)
    d.passes(True, 'PA', 1001, 5001, payload='on', state='ESTABLISHED').passes(False, 'A', 5001, 1003, state='ESTABLISHED')

    c = Case('tcp-out-of-window-%s' % f.name, 'Segments far outside the window are INVALID', 'netfilter tcp_in_window')
    d = Dialogue(c, f).open()
    d.refused(True, 'PA', 1001 + 70000000, 5001, payload='x', state='ESTABLISHED', note='ahead of the window')
    d.refused(True, 'PA', 1001 - 20000000 & 0xffffffff, 5001, payload='x', state='ESTABLISHED', note='long past', passes_too=True)
    d.refused(True, 'A', 1001, 5001 + 9000000, state='ESTABLISHED', note='acknowledges what was never sent')
    d.refused(True, 'FA', 1001 + 70000000, 5001, state='ESTABLISHED', note='a FIN ahead of the window')
    d.passes(True, 'PA', 1001, 5001, payload='fine', state='ESTABLISHED')

    c = Case('tcp-window-scale-%s' % f.name, 'Scaled windows are taken into account', 'RFC 7323 2')
    d = Dialogue(c, f)
    for options in (True,):
        f_ = [['MSS', 1460], ['NOP'], ['WS', 7]]
        s, t, p = d.segment(True, 'S', 1000, options=f_)
        c.step((s, p), [out(t, p)])
        s, t, p = d.segment(False, 'SA', 5000, 1001, options=f_)
        c.step((s, p), [out(t, p)])
    d.passes(True, 'A', 1001, 5001, win=1000, state='ESTABLISHED')
    d.passes(False, 'A', 5001 + 100000, 1001, payload={'len': 1000}, note='100 kB ahead: 1000 x 128 allows it', state='ESTABLISHED')
    d.refused(False, 'A', 5001 + 400000, 1001, payload={'len': 1000}, note='400 kB ahead: too far', state='ESTABLISHED')

    c = Case('tcp-impossible-flags-%s' % f.name, 'Flag combinations that nobody sends, and what may not open a connection', 'netfilter tcp_valid_flags, sNO')
    d = Dialogue(c, f)
    for flags in ('', 'FPU', 'SF', 'SR', 'FR', 'SFA', 'FSRPAU', 'P', 'U', 'F'):
        d.refused(True, flags, 1000, note='flags ' + (flags or 'none'))
    for flags in ('SA', 'R', 'RA', 'FA'):
        d.refused(True, flags, 1000, 77, note='%s of no connection' % flags)
    d.refused(True, 'S', 1000, note='a SYN with a wrong checksum', chksum='bad', passes_too=True)
    d.passes(True, 'SEC', 1000, note='SYN with ECN is fine', state='SYN_SENT')

    c = Case('tcp-mid-stream-%s' % f.name, 'An ACK of an unknown connection picks it up, both windows unknown', 'netfilter tcp_loose')
    d = Dialogue(c, f)
    d.passes(True, 'PA', 88000, 99000, payload='x', state='ESTABLISHED', note='picked up')
    d.passes(False, 'PA', 99000, 88001, payload='y', state='ESTABLISHED')
    d.passes(True, 'FA', 88001, 99001, state='FIN_WAIT')
    c = Case('tcp-mid-stream-strict-%s' % f.name, 'tcp_loose off: not picked up', 'netfilter tcp_loose', router_with={'conntrack': {'tcp_loose': False}})
    d = Dialogue(c, f).refused(True, 'PA', 88000, 99000, payload='x')
    d.passes(True, 'S', 1000, state='SYN_SENT')
    c = Case('tcp-mid-stream-service-%s' % f.name, 'Not towards a service: never untranslated', 'DESIGN 5', service(f, 'web', [f.a2]))
    p = packet(f.a1, f.vip, tcp(40000, 80, 'PA', 88000, 99000), payload='x')
    c.step((POD1, p), [], connections=[])
    p = packet(f.a1, f.vip, tcp(40000, 80))
    c.step((POD1, p), [out(POD2, p, dst=f.a2, dport=8080)])

    c = Case('tcp-close-both-%s' % f.name, 'FIN from the other side first; simultaneous close', 'RFC 9293 3.6')
    d = Dialogue(c, f).open()
    d.passes(False, 'FA', 5001, 1001, state='FIN_WAIT').passes(True, 'A', 1001, 5002, state='CLOSE_WAIT').passes(True, 'FA', 1001, 5002, state='LAST_ACK')
    d.passes(False, 'A', 5002, 1002, state='TIME_WAIT')
    d.passes(True, 'S', 700000, state='SYN_SENT', note='the port is used again')
    c = Case('tcp-simultaneous-close-%s' % f.name, 'FIN crosses FIN', 'RFC 9293 3.6; netfilter')
    d = Dialogue(c, f).open()
    d.passes(True, 'FA', 1001, 5001, state='FIN_WAIT').passes(False, 'FA', 5001, 1001, state='LAST_ACK')
    d.passes(True, 'A', 1002, 5002, state='TIME_WAIT').passes(False, 'A', 5002, 1002, state='TIME_WAIT')

    c = Case('tcp-retransmissions-%s' % f.name, 'Repeated SYN, SYN-ACK, data and FIN pass and change nothing', 'netfilter, which cannot tell a repeated FIN from both')
    d = Dialogue(c, f)
    d.passes(True, 'S', 1000, state='SYN_SENT').passes(True, 'S', 1000, state='SYN_SENT', after=1).passes(False, 'SA', 5000, 1001, state='SYN_RECV')
    d.passes(False, 'SA', 5000, 1001, state='SYN_RECV').passes(True, 'A', 1001, 5001, state='ESTABLISHED')
    d.passes(True, 'PA', 1001, 5001, payload='data', state='ESTABLISHED').passes(True, 'PA', 1001, 5001, payload='data', state='ESTABLISHED')
    d.passes(False, 'A', 5001, 1005, state='ESTABLISHED').passes(True, 'A', 1004, 5001, note='a keep-alive probe', state='ESTABLISHED')
    d.passes(False, 'A', 5001, 1005, state='ESTABLISHED')
    d.passes(True, 'FA', 1005, 5001, state='FIN_WAIT').passes(True, 'FA', 1005, 5001, state='LAST_ACK')
    d.passes(False, 'A', 5001, 1006, state='TIME_WAIT')
    c = Case('tcp-sequence-wraps-%s' % f.name, 'Sequence numbers wrap around', 'RFC 9293 3.4')
    d = Dialogue(c, f)
    d.passes(True, 'S', 0xffffff00, state='SYN_SENT').passes(False, 'SA', 0xfffffff0, 0xffffff01, state='SYN_RECV')
    d.passes(True, 'A', 0xffffff01, 0xfffffff1, state='ESTABLISHED')
    d.passes(True, 'PA', 0xffffff01, 0xfffffff1, payload={'len': 500}, state='ESTABLISHED')
    d.passes(False, 'PA', 0xfffffff1, 0xffffff01 + 500 & 0xffffffff, payload={'len': 300}, state='ESTABLISHED')
    d.passes(True, 'PA', 0xffffff01 + 500 & 0xffffffff, 0xfffffff1 + 300 & 0xffffffff, payload={'len': 300}, state='ESTABLISHED')
    c = Case('tcp-liberal-%s' % f.name, 'tcp_be_liberal: out of window passes, but no RST', 'netfilter tcp_be_liberal', router_with={'conntrack': {'tcp_be_liberal': True}})
    d = Dialogue(c, f).open()
    d.passes(True, 'PA', 1001 + 70000000, 5001, payload='x', state='ESTABLISHED')
    d.refused(True, 'R', 900000, state='ESTABLISHED', passes_too=True)


# One state machine serves both families; cluster IPs of both walk through it elsewhere.
tcp_states(V4)


def timeouts():
    f = V4
    day = 86400

    def lives(name, doc, build, state, seconds, slack=2, **kw):
        c = Case('timeout-' + name, doc, 'netfilter nf_conntrack_tcp_timeout_*', **kw)
        d = Dialogue(c, f)
        build(d)
        begin = c.t
        d.bystander(begin + seconds - slack, state, 'just before')
        d.bystander(begin + seconds + slack, None, 'just after')
        return c
    opened = lambda d: d.open()
    lives('syn-sent', 'SYN_SENT lives 120 s', lambda d: d.passes(True, 'S', 1000), 'SYN_SENT', 120)
    lives('syn-recv', 'SYN_RECV lives 60 s', lambda d: d.passes(True, 'S', 1000).passes(False, 'SA', 5000, 1001), 'SYN_RECV', 60)
    lives('established', 'ESTABLISHED lives five days', lambda d: opened(d).passes(False, 'A', 5001, 1001), 'ESTABLISHED', 5 * day)
    lives('fin-wait', 'FIN_WAIT lives 120 s', lambda d: opened(d).passes(False, 'A', 5001, 1001).passes(True, 'FA', 1001, 5001), 'FIN_WAIT', 120)
    lives('close-wait', 'CLOSE_WAIT lives 60 s', lambda d: opened(d).passes(True, 'FA', 1001, 5001).passes(False, 'A', 5001, 1002), 'CLOSE_WAIT', 60)
    lives('last-ack', 'LAST_ACK lives 30 s', lambda d: opened(d).passes(True, 'FA', 1001, 5001).passes(False, 'A', 5001, 1002)
          .passes(False, 'FA', 5001, 1002), 'LAST_ACK', 30)
    lives('time-wait', 'TIME_WAIT lives 120 s', lambda d: opened(d).passes(True, 'FA', 1001, 5001).passes(False, 'A', 5001, 1002)
          .passes(False, 'FA', 5001, 1002).passes(True, 'A', 1002, 5002), 'TIME_WAIT', 120)
    lives('close', 'CLOSE lives 10 s', lambda d: opened(d).passes(False, 'A', 5001, 1001).passes(True, 'R', 1001), 'CLOSE', 10)
    lives('unacknowledged', 'Data without an answer: 300 s', lambda d: opened(d).passes(False, 'A', 5001, 1001)
          .passes(True, 'PA', 1001, 5001, payload='x'), 'ESTABLISHED', 300)
    lives('picked-up', 'Picked up, and no answer: 300 s', lambda d: d.passes(True, 'A', 1001, 5001), 'ESTABLISHED', 300)
    lives('configured', 'nf_conntrack_tcp_timeout_established is read', lambda d: opened(d).passes(False, 'A', 5001, 1001), 'ESTABLISHED', 600,
          router_with={'conntrack': {'nf_conntrack_tcp_timeout_established': 600}})
    lives('syn-repeated', 'A repeated SYN does not begin it anew', lambda d: d.passes(True, 'S', 1000).passes(True, 'S', 1000, after=100), 'SYN_SENT', 20)
    lives('refreshed', 'Any other packet does', lambda d: opened(d).passes(True, 'FA', 1001, 5001).passes(False, 'A', 5001, 1002)
          .passes(False, 'PA', 5001, 1002, payload='x', after=50), 'CLOSE_WAIT', 60)

    c = Case('timeout-max-retransmissions', 'Three retransmissions without an answer: 300 s', 'netfilter tcp_max_retrans')
    d = Dialogue(c, f).open()
    d.passes(False, 'A', 5001, 1001)
    for _ in range(4):
        d.passes(True, 'PA', 1001, 5001, payload='x', after=1)
    begin = c.t
    d.bystander(begin + 298, 'ESTABLISHED', 'just before').bystander(begin + 302, None, 'just after')


timeouts()


@both
def datagram_timeouts(f):
    clock = packet(f.a2, f.a1, echo(f, ident=9), payload='clock')

    def check(c, at, entry, note):
        c.step((POD2, clock), [out(POD1, clock)], note, at=at, connections={'contains': [entry]} if note.startswith('just before') else {'absent': [entry]})
    ask, answer = packet(f.a1, f.b1, udp(40000, 53), payload='q'), packet(f.b1, f.a1, udp(53, 40000), payload='a')
    known = connection('udp', (f.a1, 40000, f.b1, 53))
    c = Case('timeout-udp-%s' % f.name, 'UDP without an answer lives 30 s; an answer alone does not make a stream', 'netfilter nf_conntrack_udp_timeout')
    c.step((POD1, ask), [out(UPLINK, ask)], connections=[connection('udp', (f.a1, 40000, f.b1, 53), None, 'unreplied')])
    check(c, c.t + 28, known, 'just before')
    check(c, c.t + 4, known, 'after')
    c = Case('timeout-udp-stream-%s' % f.name, 'A stream of five seconds lives 120 s', 'netfilter nf_conntrack_udp_timeout_stream')
    for k in range(6):
        c.step((POD1, ask), [out(UPLINK, ask)], after=0.9)
        c.step((UPLINK, answer), [out(POD1, answer)], after=0.1)
    begin = c.t
    check(c, begin + 118, connection('udp', (f.a1, 40000, f.b1, 53), None, 'established'), 'just before')
    check(c, begin + 122, known, 'after')
    c = Case('timeout-ping-%s' % f.name, 'A ping lives 30 s', 'netfilter nf_conntrack_icmp_timeout')
    p = packet(f.a1, f.b1, echo(f), payload='x')
    known = connection('icmpv6' if f.six else 'icmp', (f.a1, 77, f.b1, None))
    c.step((POD1, p), [out(UPLINK, p)])
    p = packet(f.b1, f.a1, echo(f, reply=True), payload='x')
    c.step((UPLINK, p), [out(POD1, p)])
    begin = c.t
    check(c, begin + 28, known, 'just before')
    check(c, begin + 32, known, 'after')
    c.step((UPLINK, p), [], 'a reply after that is nobody\'s')


def sctp_states(f):
    def end(c, ours, chunk, vtag, note=None, state=None, **more):
        p = packet(f.a1, f.a2, sctp(40000, 3868, chunk, vtag, **more)) if ours else packet(f.a2, f.a1, sctp(3868, 40000, chunk, vtag, **more))
        c.step((POD1 if ours else POD2, p), [out(POD2 if ours else POD1, p)], note or chunk,
               **({'connections': [connection('sctp', (f.a1, 40000, f.a2, 3868), None, state)]} if state else {}))
    c = Case('sctp-association-%s' % f.name, 'An association from INIT to ABORT; wrong tags do nothing', 'RFC 9260 8.5; netfilter')
    end(c, True, 'INIT', 0, itag=0x0a0a0a0a, state='unreplied')
    end(c, False, 'INIT_ACK', 0x0a0a0a0a, itag=0x0b0b0b0b)
    end(c, True, 'COOKIE_ECHO', 0x0b0b0b0b)
    end(c, False, 'COOKIE_ACK', 0x0a0a0a0a, state='established')
    p = packet(f.a1, f.a2, sctp(40000, 3868, 'ABORT', 0x99999999))
    c.step((POD1, p), [], 'an ABORT with a wrong tag', connections=[connection('sctp', (f.a1, 40000, f.a2, 3868), None, 'established')])
    end(c, True, 'DATA', 0x0b0b0b0b, state='established')
    p = packet(f.a1, f.a2, sctp(40000, 3868, 'ABORT', 0x0b0b0b0b))
    c.step((POD1, p), [out(POD2, p)], 'ABORT', connections={'absent': [connection('sctp', (f.a1, 40000, f.a2, 3868), None, 'established')]})
    c = Case('sctp-first-%s' % f.name, 'DATA, COOKIE ACK and ABORT open no association', 'netfilter sctp_conntracks')
    for chunk in ('DATA', 'COOKIE_ACK', 'ABORT', 'SHUTDOWN', 'INIT_ACK', 'COOKIE_ECHO'):
        p = packet(f.a1, f.a2, sctp(40000, 3868, chunk, 0x1234))
        if chunk in ('DATA', 'HEARTBEAT'):
            continue                             # netfilter follows these as of another path (multihoming)
        c.step((POD1, p), [], chunk, connections=[])
    p = packet(f.a1, f.a2, sctp(40000, 3868, 'INIT', 0x1234))
    c.step((POD1, p), [], 'an INIT with a tag', connections=[])
    end(c, True, 'INIT', 0, itag=0x0a0a0a0a, state='unreplied')


sctp_states(V4)


@both
def pings(f):
    c = Case('ping-states-%s' % f.name, 'Echo: unreplied, established; a reply of none; other messages', 'netfilter icmp')
    p = packet(f.a1, f.b1, echo(f), payload='x')
    proto = 'icmpv6' if f.six else 'icmp'
    c.step((POD1, p), [out(UPLINK, p)], connections=[connection(proto, (f.a1, 77, f.b1, None), None, 'unreplied')])
    q = packet(f.b1, f.a1, echo(f, reply=True), payload='x')
    c.step((UPLINK, q), [out(POD1, q)], connections=[connection(proto, (f.a1, 77, f.b1, None), None, 'established')])
    q = packet(f.b1, f.a1, echo(f, ident=78, reply=True), payload='x')
    c.step((UPLINK, q), [], 'a reply with another id')
    q = packet(f.b2, f.a1, echo(f, reply=True), payload='x')
    c.step((UPLINK, q), [], 'a reply from somebody else')
    q = packet(f.b1, f.a1, echo(f), payload='x')
    c.step((UPLINK, q), [out(POD1, q)], 'a ping the other way with the same id is another')
    q = packet(f.a1, f.b1, echo(f, reply=True), payload='x')
    c.step((POD1, q), [out(UPLINK, q)], 'and has its reply')
