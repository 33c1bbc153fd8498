// Reads dashboards as Grafana's own schema defines them. Each argument is a file. Prints every unknown field, missing field,
// wrong type and violated constraint, and exits with 1 if there is one.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

func main() {
	runtime := cog.NewRuntime()
	runtime.RegisterPanelcfgVariant(timeseries.VariantConfig())
	runtime.RegisterDataqueryVariant(prometheus.VariantConfig())
	code := 0
	for _, path := range os.Args[1:] {
		if err := check(path); err != nil {
			fmt.Printf("%s: %v\n", path, err)
			code = 1
		}
	}
	os.Exit(code)
}

func check(path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	read := dashboard.Dashboard{}
	// without a fault it returns an empty list, which is not nil
	if err := read.UnmarshalJSONStrict(content); err != nil && err.Error() != "" {
		return err
	}
	for _, one := range read.Panels {
		if one.Panel == nil {
			continue
		}
		// the schema has options and queries of known kinds only for these; others would be read as free maps
		if _, known := cog.ConfigForPanelcfgVariant(one.Panel.Type); !known {
			return fmt.Errorf("panel %q has the type %q, which this program does not know", *one.Panel.Title, one.Panel.Type)
		}
		for _, target := range one.Panel.Targets {
			if _, known := target.(prometheus.Dataquery); !known {
				other, _ := json.Marshal(target)
				return fmt.Errorf("panel %q has a query that is not of Prometheus: %s", *one.Panel.Title, other)
			}
		}
	}
	return read.Validate()
}
