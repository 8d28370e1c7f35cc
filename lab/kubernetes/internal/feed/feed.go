// Package feed writes a cluster's objects into a folder of manifests, for a router that reads files. It goes when weir reads the API itself.
package feed

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// kinds are what a router reads; a kind that the server does not have (yet) is looked for again.
var kinds = []struct{ group, resource string }{
	{"", "nodes"}, {"", "namespaces"}, {"", "pods"}, {"", "services"}, {"", "serviceaccounts"},
	{"discovery.k8s.io", "endpointslices"}, {"networking.k8s.io", "networkpolicies"},
	{"policy.networking.k8s.io", "clusternetworkpolicies"},
	{"projectcalico.org", ""}, {"crd.projectcalico.org", ""},
}

// gathering is how long a change waits for others of its kind.
const gathering = 20 * time.Millisecond

// lookAgain is how often kinds that were not there are looked for.
const lookAgain = 2 * time.Second

// Run writes until the context ends. When all kinds have had their first list, it makes the file `complete`.
func Run(ctx context.Context, kubeconfig, folder string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 200, 400
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return err
	}
	names, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		return err
	}
	complete := filepath.Join(folder, "complete")
	followed := map[schema.GroupVersionResource]bool{}
	for {
		served, err := names.ServerPreferredResources()
		if err != nil && len(served) == 0 {
			return err
		}
		for _, list := range served {
			version, err := schema.ParseGroupVersion(list.GroupVersion)
			if err != nil {
				return err
			}
			for _, resource := range list.APIResources {
				name := version.WithResource(resource.Name)
				if followed[name] || !wanted(version.Group, resource.Name) {
					continue
				}
				followed[name] = true
				if err := follow(ctx, client, name, resource.Kind, folder); err != nil {
					return err
				}
			}
		}
		// Once: a router that watches the folder would take each time for a change.
		if _, err := os.Stat(complete); err != nil {
			if err := os.WriteFile(complete, nil, 0o600); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookAgain):
		}
	}
}

func wanted(group, resource string) bool {
	for _, kind := range kinds {
		if kind.group == group && (kind.resource == resource || kind.resource == "") {
			return true
		}
	}
	return false
}

// follow lists a kind, writes it, and goes on writing it whenever it changes.
func follow(ctx context.Context, client dynamic.Interface, name schema.GroupVersionResource, kind, folder string) error {
	informer := dynamicinformer.NewFilteredDynamicInformer(client, name, "", 0, cache.Indexers{}, nil).Informer()
	changed := make(chan struct{}, 1)
	tell := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { tell() },
		UpdateFunc: func(_, _ any) { tell() },
		DeleteFunc: func(any) { tell() },
	})
	if err != nil {
		return err
	}
	// What nobody reads is not written: managed fields are most of an object.
	if err := informer.SetTransform(func(object any) (any, error) {
		if object, ok := object.(*unstructured.Unstructured); ok {
			object.SetManagedFields(nil)
		}
		return object, nil
	}); err != nil {
		return err
	}
	go informer.Run(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return fmt.Errorf("no list of %s", name)
	}
	path := filepath.Join(folder, name.Resource+"."+name.Group+".yaml")
	if err := write(informer.GetStore(), path); err != nil {
		return err
	}
	var once sync.Once
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			time.Sleep(gathering)
			if err := write(informer.GetStore(), path); err != nil {
				once.Do(func() { fmt.Fprintln(os.Stderr, err) })
			}
		}
	}()
	return nil
}

// write replaces the file by what the store holds; nobody sees half of it.
func write(store cache.Store, path string) error {
	objects := store.List()
	texts := make([]string, 0, len(objects))
	for _, object := range objects {
		text, err := json.Marshal(object.(*unstructured.Unstructured).Object)
		if err != nil {
			return err
		}
		texts = append(texts, string(text))
	}
	sort.Strings(texts)
	beside := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	file, err := os.Create(beside)
	if err != nil {
		return err
	}
	defer file.Close()
	// JSON is YAML: a document each, so that an unchanged one is known by its text.
	for _, text := range texts {
		if _, err := file.WriteString("---\n" + text + "\n"); err != nil {
			return err
		}
	}
	if err := file.Close(); err != nil {
		return err
	}
	return os.Rename(beside, path)
}
