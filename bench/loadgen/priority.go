package main

import (
	"log"
	"os"
	"strconv"
	"syscall"
	"unsafe"
)

// Of sched(7). A batch thread that wakes waits until a processor is free or its turn comes; another
// one may take the processor from who runs.
const (
	schedOther = 0
	schedBatch = 3
)

// schedule sets the policy of all threads of this program; those to come have it from their makers.
func schedule(policy uintptr) {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		log.Printf("the load generator's threads stay as they are: %v", err)
		return
	}
	for _, each := range threads {
		id, err := strconv.Atoi(each.Name())
		if err != nil {
			continue
		}
		var priority int32 // both policies have no other than 0
		_, _, failed := syscall.Syscall(
			syscall.SYS_SCHED_SETSCHEDULER, uintptr(id), policy, uintptr(unsafe.Pointer(&priority)),
		)
		if failed != 0 && failed != syscall.ESRCH { // it may have ended
			log.Printf("thread %d stays as it is: %v", id, failed)
		}
	}
}
