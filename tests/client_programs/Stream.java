// Java's HttpClient, which tries to upgrade to HTTP/2:  java Stream.java java URL [LAST EVENT'S ID]
//
// See streams.py for the rest.
import java.io.PrintStream;
import java.net.URI;
import java.net.http.*;
import java.nio.charset.StandardCharsets;
import java.util.*;

class Stream {
    static final PrintStream out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    static final Map<String, String> fields = new HashMap<>();

    static String quoted(String text) {
        return '"' + text.replace("\\", "\\\\").replace("\"", "\\\"") + '"';
    }

    static void take(String line) {
        int colon = line.indexOf(": ");
        if (colon >= 0) {
            fields.put(line.substring(0, colon), line.substring(colon + 2));
        } else if (line.isEmpty() && fields.containsKey("data")) {
            out.printf("[%s, %s, %s]%n", quoted(fields.get("id")), quoted(fields.get("event")),
                       quoted(fields.get("data")));
            fields.clear();
        }
    }

    public static void main(String[] args) throws Exception {
        byte[] body = System.in.readAllBytes();
        var request = HttpRequest.newBuilder(URI.create(args[1]))
            .header("X-Replicas-Engine-Secret", System.getenv("SECRET"));
        if (args.length > 2) request.header("Last-Event-ID", args[2]);
        if (body.length > 0) request.POST(HttpRequest.BodyPublishers.ofByteArray(body));
        HttpClient.newHttpClient().send(request.build(), HttpResponse.BodyHandlers.ofLines())
            .body().forEach(Stream::take);
        out.println("[\"end\"]");
    }
}
