package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Reboot ends a node as a power failure does, with all that runs on it, and starts it again: files stay, but for those in /run; network
// devices, mounts and control groups are new. It returns when the node's services are to start, long before they answer.
func (c *Cluster) Reboot(ctx context.Context, name string) error {
	number := -1
	for i, node := range c.Nodes {
		if node.Name == name {
			number = i
		}
	}
	if number < 0 {
		return fmt.Errorf("no node %q", name)
	}
	node := &c.Nodes[number]
	// The holder first, or it would start again what ends.
	if node.Alive() {
		if err := kill(node.PID); err != nil {
			return err
		}
	}
	if _, err := end(ctx, filepath.Join(c.Name, name), func(int) {}); err != nil {
		return err
	}
	// Services begin when the network is there, as at a boot.
	services, aside := c.services(name), c.services(name)+".off"
	if err := os.Rename(services, aside); err != nil {
		return err
	}
	holder, err := c.hold(name)
	if err != nil {
		return err
	}
	node.Holder = holder
	if err := c.save(); err != nil {
		return err
	}
	// The kernel removes the devices of a namespace a moment after its last process.
	port := portOf(number)
	err = Until(ctx, 20*time.Second, "the old link of "+name+" to go", func() error {
		if c.ip(c.Outside, "link show "+port) == nil {
			return fmt.Errorf("%s is still there", port)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := c.connect(number); err != nil {
		return err
	}
	return os.Rename(aside, services)
}
