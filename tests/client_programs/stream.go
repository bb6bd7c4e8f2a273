// Go's net/http:  stream go URL [LAST EVENT'S ID]
//
// See streams.py for the rest.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
)

func show(event ...string) {
	if err := json.NewEncoder(os.Stdout).Encode(event); err != nil {
		panic(err)
	}
}

func main() {
	body, _ := io.ReadAll(os.Stdin)
	method := "GET"
	if len(body) > 0 {
		method = "POST"
	}
	request, err := http.NewRequest(method, os.Args[2], bytes.NewReader(body))
	if err != nil {
		panic(err)
	}
	request.Header.Set("X-Replicas-Engine-Secret", os.Getenv("SECRET"))
	if len(os.Args) > 3 {
		request.Header.Set("Last-Event-ID", os.Args[3])
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		panic(err)
	}
	fields := map[string]string{}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, 1<<24) // it would refuse a line of more than 64 KiB
	for lines.Scan() {
		name, value, found := strings.Cut(lines.Text(), ": ")
		if found {
			fields[name] = value
		} else if data, found := fields["data"]; found {
			show(fields["id"], fields["event"], data)
			fields = map[string]string{}
		}
	}
	if err := lines.Err(); err != nil {
		panic(err)
	}
	show("end")
}
