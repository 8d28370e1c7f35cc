package suites

import (
	"errors"
	"os/exec"
	"syscall"
	"time"
)

// How long an interrupted suite may take to give back what it made.
const cleanupTimeout = 2 * time.Minute

// inGroup makes a command the head of a process group of its own. When its context ends, the group is interrupted as by Ctrl-C, so that it
// cleans up after itself; what is left of it when the command is over is killed.
func inGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = cleanupTimeout
}

// runInGroup runs a command of inGroup.
func runInGroup(cmd *exec.Cmd) error {
	if err := cmd.Start(); err != nil {
		return err
	}
	err := cmd.Wait()
	// The group's number stays taken while one of its processes lives, so it cannot be another's; without any, this is ESRCH.
	if killed := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); killed != nil && !errors.Is(killed, syscall.ESRCH) {
		return errors.Join(err, killed)
	}
	return err
}
