package rolling

import (
	"fmt"
	"time"

	"weir.dev/lab/kubernetes/internal/build"
)

const (
	namespace = "weir-rolling"

	replicas  = 6
	preStop   = 4 * time.Second
	webPort   = 80
	udpPort   = 81
	sinkPort  = 5001
	sinkOf    = "sink"
	plain     = "web"
	affine    = "web-affinity"
	nodePorts = "web-node-port"

	clientOne  = "client-one"
	clientTwo  = "client-two"
	clientFew  = "client-few-ports"
	fewPorts   = 2048
	firstOfFew = 40000
)

// manifest is what the scenarios need: six servers as the roll-outs of the issue had them, three services before them, and clients on two nodes. Bulk data
// goes from the first client's node to the other.
//
// Datagrams are echoed by a server that answers what it has received before it ends: what a process leaves unread is lost by it and not by the
// network, and nobody but its own kernel ever knows.
func manifest(first, second string) string {
	text := fmt.Sprintf(`apiVersion: v1
kind: Namespace
metadata: {name: %[1]s}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  replicas: %[3]d
  strategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 1}}
  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}}
    spec:
      terminationGracePeriodSeconds: 15
      containers:
      - name: netexec
        image: %[4]s
        imagePullPolicy: IfNotPresent
        args: [netexec, --http-port=8080, --udp-port=8082]
        ports: [{containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, initialDelaySeconds: 1, periodSeconds: 1}
        lifecycle: {preStop: {sleep: {seconds: %[5]d}}}
      - name: echo
        image: %[6]s
        imagePullPolicy: Never
        command: [/rollclient, echo, "-listen=:8081"]
        ports: [{containerPort: 8081, protocol: UDP}]
        lifecycle: {preStop: {sleep: {seconds: %[5]d}}}
`, namespace, plain, replicas, build.AgnhostImage, int(preStop.Seconds()), build.RollClientImage)
	for name, rest := range map[string]string{plain: "", affine: "  sessionAffinity: ClientIP\n", nodePorts: "  type: NodePort\n"} {
		text += fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: %s}
spec:
  selector: {app: %s}
  ports:
  - {name: http, port: %d, targetPort: 8080}
  - {name: udp, port: %d, targetPort: 8081, protocol: UDP}
%s`, name, namespace, plain, webPort, udpPort, rest)
	}
	few := fmt.Sprintf("  securityContext: {sysctls: [{name: net.ipv4.ip_local_port_range, value: \"%d %d\"}]}\n", firstOfFew, firstOfFew+fewPorts-1)
	for _, pod := range []struct{ name, node, arguments, rest string }{
		{clientOne, first, "wait", ""},
		{clientTwo, second, "wait", ""},
		{clientFew, second, "wait", few},
		{sinkOf, second, fmt.Sprintf("sink, \"-listen=:%d\"", sinkPort), ""},
	} {
		text += fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s, labels: {app: %[1]s}}
spec:
  nodeName: %[3]s
  terminationGracePeriodSeconds: 2
%[6]s  containers:
  - name: rollclient
    image: %[4]s
    imagePullPolicy: Never
    command: [/rollclient, %[5]s]
`, pod.name, namespace, pod.node, build.RollClientImage, pod.arguments, pod.rest)
	}
	return text + fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  selector: {app: %[1]s}
  ports: [{port: %[3]d}]
`, sinkOf, namespace, sinkPort)
}
