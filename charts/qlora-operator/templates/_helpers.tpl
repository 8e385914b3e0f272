{{- define "qlora.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Of what is in no namespace: with watchNamespaces, several releases of one name may stand side by side. */ -}}
{{- define "qlora.clusterName" -}}
{{- if .Values.watchNamespaces -}}{{ .Release.Namespace }}-{{ end -}}{{ include "qlora.name" . }}
{{- end -}}

{{- define "qlora.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "qlora.name" .) -}}
{{- end -}}

{{- define "qlora.selector" -}}
app.kubernetes.io/name: qlora-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "qlora.labels" -}}
{{ include "qlora.selector" . }}
app.kubernetes.io/part-of: qlora-operator
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end -}}

{{- /* What the operator really does; tests/e2e hold this against the API server's audit log. */ -}}
{{- define "qlora.rules" -}}
- apiGroups: [qlora.dev]
  resources: [qlorajobs]
  verbs: [list, watch]
- apiGroups: [qlora.dev]
  resources: [qlorajobs/status]
  verbs: [patch]
{{- if .Values.ownerReferencesPermission }}
- apiGroups: [qlora.dev]
  resources: [qlorajobs/finalizers]
  verbs: [update]
{{- end }}
- apiGroups: [batch]
  resources: [jobs]
  verbs: [list, watch, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, list] # list: why a pod or Job doesn't start
{{- if include "qlora.dynamicResources" . }}
- apiGroups: [resource.k8s.io]
  resources: [resourceclaimtemplates]
  verbs: [create]
{{- end }}
{{- end -}}

{{- /* What it looks at outside of namespaces. */ -}}
{{- define "qlora.discoveryRules" -}}
{{- if .Values.discovery.nodes }}
- apiGroups: [""]
  resources: [nodes]
  verbs: [list, watch]
{{- end }}
{{- if include "qlora.dynamicResources" . }}
- apiGroups: [resource.k8s.io]
  resources: [resourceslices]
  verbs: [list, watch]
{{- end }}
{{- end -}}

{{- /* Not empty where the operator reads ResourceSlices and makes ResourceClaimTemplates. */ -}}
{{- define "qlora.dynamicResources" -}}
{{- if eq (toString .Values.discovery.dynamicResources) "auto" -}}
{{- if .Capabilities.APIVersions.Has "resource.k8s.io/v1" }}true{{ end -}}
{{- else if .Values.discovery.dynamicResources }}true{{ end -}}
{{- end -}}
