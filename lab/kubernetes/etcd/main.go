// Etcd is a module of its own: Kubernetes' modules want an older one, and its own program cannot be installed by version.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
