package suites

import (
	"encoding/json"
	"regexp"
	"strconv"
	"strings"
)

// pair is a flow that a failed test asked for, as far as its output tells: a line of `weir trace`.
type pair struct {
	Source      string `json:"src"`
	Destination string `json:"dst"`
	Protocol    string `json:"proto"`
	Port        int    `json:"dport"`
}

const (
	addressExpression = `(\d+\.\d+\.\d+\.\d+|\[[0-9a-fA-F:]+\]|[0-9a-fA-F]*:[0-9a-fA-F:]+)`
	mostPairs         = 8
)

var (
	// kubectl exec, as most tests of services do.
	execLine = regexp.MustCompile(`--namespace=(\S+) exec (\S+) (.*)`)
	// "Exec {Command:[...] Namespace:x PodName:y ..." of the framework.
	execOptions = regexp.MustCompile(`Exec(?:WithOptions)? \{Command:\[(.*?)\] Namespace:(\S+) PodName:(\S+) `)
	// ClusterNetworkPolicy's tests: the command, and in the next line where it ran.
	connectLine = regexp.MustCompile(`/agnhost connect (.*?)\]`)
	connectFrom = regexp.MustCompile(`from (\S+)/(\S+) to `)

	urlTarget     = regexp.MustCompile(`https?://` + addressExpression + `:(\d+)`)
	netcatTarget  = regexp.MustCompile(`nc (.*?)` + addressExpression + ` (\d+)`)
	connectTarget = regexp.MustCompile(addressExpression + `:(\d+)`)
)

// pairs finds flows in a test's output, the last ones, without repetitions.
func pairs(output string) []pair {
	var found []pair
	add := func(source, command string) {
		p := pair{Source: source, Protocol: "tcp"}
		var port string
		if match := urlTarget.FindStringSubmatch(command); match != nil {
			p.Destination, port = match[1], match[2]
		} else if match := netcatTarget.FindStringSubmatch(command); match != nil {
			p.Destination, port = match[2], match[3]
			if strings.Contains(match[1], "-u ") {
				p.Protocol = "udp"
			}
		} else if match := connectTarget.FindStringSubmatch(command); match != nil {
			p.Destination, port = match[1], match[2]
		} else {
			return
		}
		for _, protocol := range []string{"udp", "sctp"} {
			if strings.Contains(command, "--protocol="+protocol) || strings.Contains(command, "protocol="+protocol) {
				p.Protocol = protocol
			}
		}
		p.Destination = strings.Trim(p.Destination, "[]")
		p.Port, _ = strconv.Atoi(port)
		for i, other := range found {
			if other == p {
				found = append(found[:i], found[i+1:]...)
				break
			}
		}
		found = append(found, p)
	}
	var connect string
	for line := range strings.Lines(output) {
		if match := execLine.FindStringSubmatch(line); match != nil {
			add(match[1]+"/"+match[2], match[3])
		} else if match := execOptions.FindStringSubmatch(line); match != nil {
			add(match[2]+"/"+match[3], match[1])
		} else if match := connectLine.FindStringSubmatch(line); match != nil {
			connect = match[1]
		} else if match := connectFrom.FindStringSubmatch(line); match != nil && connect != "" {
			add(match[1]+"/"+match[2], connect)
			connect = ""
		}
	}
	if len(found) > mostPairs {
		found = found[len(found)-mostPairs:]
	}
	return found
}

// flows are pairs as `weir trace --flows` reads them.
func flows(found []pair) string {
	var text strings.Builder
	for _, p := range found {
		line, err := json.Marshal(p)
		if err != nil {
			continue
		}
		text.Write(line)
		text.WriteByte('\n')
	}
	return text.String()
}
