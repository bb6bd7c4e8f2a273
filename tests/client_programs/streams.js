// Node's clients, each as its own documentation uses it:  streams.js NAME URL [LAST EVENT'S ID]
//
// The packages are found by NODE_PATH. See streams.py for the rest.
'use strict';
const fs = require('fs');

const [name, url, lastId] = process.argv.slice(2);
const body = fs.readFileSync(0);
const init = {headers: {'X-Replicas-Engine-Secret': process.env.SECRET}};
if (lastId) init.headers['last-event-id'] = lastId;
if (body.length) Object.assign(init, {method: 'POST', body});

const show = (...event) => console.log(JSON.stringify(event));

const clients = {
  async fetch() {
    const response = await fetch(url, init);
    const decoder = new TextDecoder();
    let text = '';
    for await (const piece of response.body ?? []) {        // it is null for a 204
      text += decoder.decode(piece, {stream: true});
      const blocks = text.split('\n\n');
      text = blocks.pop();
      for (const block of blocks) {
        // Not by a RegExp: its `.` and `$` stop at U+2028
        const fields = Object.fromEntries(block.split('\n').map(line => line.split(/: (.*)/s)));
        if ('data' in fields) show(fields.id, fields.event, fields.data);
      }
    }
  },

  eventsource: () => new Promise(resolve => {
    const {EventSource} = require('eventsource');
    const source = new EventSource(url, {
      fetch(input, options) {
        const headers = new Headers(init.headers);
        new Headers(options.headers).forEach((value, name) => headers.set(name, value));
        return fetch(input, {...options, headers});
      },
    });
    // The engine's events have names, so that onmessage never gets one
    for (const type of ['thread.started', 'item.completed', 'turn.completed', 'done']) {
      source.addEventListener(type, event => show(event.lastEventId, event.type, event.data));
    }
    source.onerror = () => {
      if (source.readyState === source.CLOSED) resolve();   // else it connects again by itself
    };
  }),

  async fetch_event_source() {
    global.window = globalThis;
    global.document = {removeEventListener() {}};           // it is made for browsers
    const {fetchEventSource} = require('@microsoft/fetch-event-source');
    const ended = new AbortController();
    await fetchEventSource(url, {
      ...init,
      signal: ended.signal,
      openWhenHidden: true,
      async onopen(response) {
        if (response.status === 204) ended.abort();         // else it asks again for ever
        else if (!response.ok) throw new Error(`HTTP ${response.status}`);
      },
      onmessage(event) {
        if (event.data) show(event.id, event.event, event.data);    // else it is a comment
      },
    });
  },
};

// Node would end while nothing is open between two connections, as no program with a purpose does
const alive = setInterval(() => {}, 1000);
clients[name]().then(() => show('end')).finally(() => clearInterval(alive));
